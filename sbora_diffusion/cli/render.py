"""Tables and the ledger's bar, for terminals of 80 columns."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from sbora_diffusion.adapters.certificate import Certificate
from sbora_diffusion.adapters.file import Adapter, has_digest
from sbora_diffusion.library.ledger import Ledger

OWNED = (("█", "cyan"), ("▓", "magenta"))  # neighbours differ in shade too, for terminals without colour
SHARED = ("×", "bold red")
FREE = ("·", "dim")


def show(renderable: RenderableType) -> None:
    """Print to stdout, without cropping."""
    Console(highlight=False, markup=False).print(renderable)


def adapter_table(paths: Sequence[Path], adapters: Sequence[Adapter]) -> Table:
    """Return a table with one row per adapter."""
    table = Table("name", "base", "method", "columns", "tokens", "steps", "size", box=None, pad_edge=False)
    for path, adapter in zip(paths, adapters, strict=True):
        spec = adapter.spec
        table.add_row(
            spec.name,
            spec.base_id,
            f"{spec.method or spec.side} r{spec.rank}",
            _intervals(adapter),
            _tokens(adapter),
            str(spec.recipe.get("steps", "–")),
            _size(path),
        )
    for column in table.columns:
        column.overflow = "fold"
    return table


def adapter_details(path: Path, adapter: Adapter) -> Table:
    """Return everything about one adapter, one line each."""
    spec = adapter.spec
    num_parameters = adapter.num_weights()
    rows = {
        "name": spec.name,
        "file": f"{path} ({_size(path)})",
        "base": f"{spec.base_id} [{spec.base_fingerprint}]",
        "adapter": f"{spec.method or f'SBoRA-{spec.side.upper()}'} of rank {spec.rank}, {num_parameters:,} parameters",
        "layers": f"{len(adapter.factors) + len(adapter.dense)}",
        "intervals": f"{_intervals(adapter)} (seed {spec.seed})",
        "tokens": _tokens(adapter),
        "merged from": ", ".join(spec.parents),
        "content": "checked against its SHA-256 digest" if has_digest(path) else "unchecked: written without a digest",
        **{key: str(value) for part in (spec.recipe, spec.metrics, spec.versions) for key, value in part.items()},
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for key, value in rows.items():
        if value:
            grid.add_row(key, Text(value if value.isprintable() else ascii(value)))
    return grid


def certificate_table(certificate: Certificate) -> Group:
    """Return a row for each group of layers, then what is guaranteed and what is not."""
    table = Table("layers", "", "shared", "free", "‖ΔW‖ of each", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for column in table.columns[:4]:
        column.no_wrap = True
    for group, (number, layer) in certificate.groups.items():
        norms = (f"{name}={norm:.3g}" for name, norm in zip(certificate.names, layer.norms, strict=True))
        free = "?" if layer.free is None else str(layer.free)
        table.add_row(group, str(number), str(layer.overlap), free, Text("  ".join(norms)))
    return Group(table, Text(f"\n{certificate.describe()}"))


def ledger_bar(ledger: Ledger, rank: int, width: int = 78) -> Group:
    """Return a title, a bar of the positions, and its legend."""
    what = "columns" if ledger.side == "fa" else "rows"
    title = f"{ledger.base_id} [{ledger.base_fingerprint}] {what} ({ledger.side})"
    stop = ledger.width or max((owner.interval.stop for owner in ledger.owners), default=1)
    bar, legend = Text(), Table.grid("", "", Column(overflow="fold"), padding=(0, 2))
    cells = list(_cells(ledger, stop, width))
    for mark, style in cells:
        bar.append(mark, style)
    for (mark, style), owner in zip(cycle(OWNED), ledger.first_owners, strict=False):
        note = "" if owner.state == "trained" else f" ({owner.state})"
        legend.add_row(Text(mark, style), Text(str(owner.interval)), Text(owner.name + note))
    if SHARED in cells:
        legend.add_row(Text(*SHARED), Text(), Text("several owners"))
    for name in ledger.only_merged:
        legend.add_row(Text(), Text("merged"), Text(name))
    for name in ledger.unplaced:
        legend.add_row(Text(), Text("elsewhere"), Text(f"{name}: has no interval, inspect it with others"))
    return Group(Text(title, "bold"), Text(_room(ledger, rank)), bar, legend)


def _room(ledger: Ledger, rank: int) -> str:
    if ledger.width is None:
        return "their number is known after the next training"
    num_free = sum(gap.rank for gap in ledger.gaps)
    return (
        f"{ledger.width - num_free} of {ledger.width} owned, {num_free} free: "
        f"room for {ledger.room(rank)} more of rank {rank}, of {ledger.width // rank}"
    )


def _cells(ledger: Ledger, stop: int, width: int) -> Iterator[tuple[str, str]]:
    """Yield mark and style of each character of the bar, by the owner of the middle of its positions."""
    styles = list(zip(ledger.first_owners, cycle(OWNED), strict=False))
    for cell in range(width):
        position = int((cell + 0.5) * stop / width)
        own = [style for owner, style in styles if owner.interval.start <= position < owner.interval.stop]
        yield SHARED if len(own) > 1 else (*own, FREE)[0]


def _intervals(adapter: Adapter) -> str:
    return ", ".join(map(str, adapter.spec.intervals)) or "none"


def _tokens(adapter: Adapter) -> str:
    return ", ".join(f"{token} ({noun})" for token, noun in adapter.spec.tokens.items()) or "none"


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
