"""What the llm commands do: progress on stderr, what was written or measured handed back."""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sbora_diffusion import __version__
from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.certificate import certify
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge, merged_name
from sbora_diffusion.evaluation.reports.llm_table import Measured, accuracy_table, to_json
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.library.library import Library
from sbora_diffusion.llm.adapters import find_folder, load_adapter, read_about, read_concept
from sbora_diffusion.llm.base import check_method, load_base
from sbora_diffusion.llm.chat import NONE, Chat
from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.llm.evaluate import Harness
from sbora_diffusion.llm.export import export
from sbora_diffusion.llm.run_folder import ADAPTER, Run, Trained
from sbora_diffusion.llm.train import Reserve, train
from sbora_diffusion.methods.registry import find_method
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import check_writable, write_atomically

log = logging.getLogger(__name__)


def fine_tune(run: Run, config: LlmConfig, folder: Path, library: Library, *, resume: bool) -> list[Path]:
    """Train; the paths of what was written, none in the other processes of several.

    An SBoRA adapter goes into the library too, under the folder's name: nobody else is given its columns.
    """
    check_method(run.method)
    name = folder.resolve().name
    path = library.path(name)
    if find_method(run.method).owns_interval and path.exists() and not (folder / ADAPTER).is_dir():
        raise SboraError(f"{path} exists", f"Choose another --out, or: sbora-diffusion remove {name}")
    reserved: list[Interval] = []

    def reserve(space: Space, wanted: Interval | None) -> Interval:
        reserved.append(library.reserve(space, config.rank, name, wanted))
        return reserved[0]

    try:
        trained = _train_with_progress(run, config, folder, resume, reserve)
        if trained and trained.concept:
            Adapter.load(trained.concept).save(path, force=True)
    finally:
        if reserved:
            library.release(name)
    if trained is None:
        return []
    log.info("next: sbora-diffusion llm chat --base %s --adapter %s", run.base, folder)
    return [trained.adapter, *([path] if trained.concept else [])]


def _train_with_progress(run: Run, config: LlmConfig, folder: Path, resume: bool, reserve: Reserve) -> Trained | None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=None)

        def watch(step: int, steps: int, loss: float) -> None:
            progress.update(bar, completed=step, total=steps, description=f"loss {loss:.3f}")

        return train(run, config, folder, resume, watch, reserve)


def measure(
    base: str,
    tasks: str,
    adapters: Sequence[str],
    data: Path | None,
    quantize: str,
    limit: int | None,
    out: Path | None,
    options: Mapping[str, str],
    *,
    force: bool,
    tell: Callable[[str], None],
) -> None:
    """Tell the table of the adapters, or of the base model if there are none; all numbers go to `out`.

    What is measured is kept after each model and told even if a later one, or the writing, fails.
    """
    if out and out.exists() and not force:
        raise SboraError(f"{out} exists", "Choose another --out, or overwrite it with --force.")
    if out:
        check_writable(out)
    _check_different(adapters)
    batch_size, dtype = _evaluation_options(options)
    harness = Harness([task.strip() for task in tasks.split(",") if task.strip()], data)
    abouts = {source: read_about(source) for source in adapters}  # a wrong one is told before minutes of work
    model, tokenizer = load_base(base, dtype, quantize)
    told = {"command": ["sbora-diffusion", *sys.argv[1:]], "base": base, "quantize": quantize, "limit": limit}
    told |= {"versions": {"sbora-diffusion": __version__, "torch": torch.__version__}, "dtype": str(dtype)}
    measured: list[Measured] = []
    try:
        for source in adapters or [""]:
            adapted = load_adapter(model, source, "default").eval() if source else model
            scores = harness.run(adapted, tokenizer, batch_size, limit)
            measured.append(Measured(source=source, about=abouts.get(source, {}), scores=scores))
            model = adapted.unload() if source else model
            if out:
                write_atomically(out, json.dumps(told | {"models": [*map(to_json, measured)]}, indent=1).encode())
    finally:
        if measured:
            tell(accuracy_table(measured))


def _check_different(adapters: Sequence[str]) -> None:
    """Raise SboraError if one is named twice: it would count as two seeds."""
    named: dict[Path, str] = {}
    for source in adapters:
        place = (find_folder(source) or Path(source)).resolve()
        if place in named:
            raise SboraError(f"{named[place]} and {source} are one adapter", "name each --adapter once")
        named[place] = source


def merge_files(files: Sequence[str], weights: Sequence[float], out: Path | None, *, force: bool) -> Path:
    """Add SBoRA adapters up; the concept file."""
    adapters = [read_concept(file) for file in files]
    merged = merge(adapters, weights, "sum")
    path = out or Path(f"{merged_name(adapters)}.safetensors")
    merged.save(path, force)
    log.info(certify(adapters, None).describe())
    log.info("next: sbora-diffusion llm export %s --to peft --out DIR", path)
    return path


def export_adapter(adapter: str, to: str, out: Path, base: str, *, dequantize: bool) -> Path:
    """The folder that was written."""
    return export(adapter, to, out, base, dequantize)


def talk(base: str, adapters: Sequence[str], quantize: str, max_tokens: int, temperature: float) -> None:
    """Read lines from stdin, write answers to stdout, until the input ends."""
    names = {_name(source): source for source in adapters}
    if len(names) < len(adapters) or NONE in names:
        raise SboraError(f"got adapters of the names {', '.join(names)}", f"each needs its own, and none {NONE!r}")
    model, tokenizer = load_base(base, "auto", quantize)
    inside = {name: f"chat-{number}" for number, name in enumerate(names)}  # PEFT allows not every name
    for name, source in names.items():
        model = load_adapter(model, source, inside[name]).eval()
    templates = {name: read_about(source).get("config", {}).get("template", "chat") for name, source in names.items()}
    chat = Chat(model, tokenizer, inside, max_tokens, temperature, templates)
    screen = Console(stderr=True, highlight=False)
    screen.print(f"with {chat.active}; /help says what else")
    while (line := _read_line(screen)) is not None and line != "/quit":
        if line.startswith("/"):
            screen.print(_told(chat, line))
            continue
        try:
            for piece in chat.say(line) if line else ():
                sys.stdout.write(piece)
                sys.stdout.flush()
        except SboraError as defect:
            screen.print(f"error: {defect}")
        sys.stdout.write("\n")


def _name(source: str) -> str:
    """Of a file without its suffix; a folder's dots are its own."""
    path = Path(source).resolve()
    return path.stem if path.is_file() else path.name


def _told(chat: Chat, line: str) -> str:
    try:
        return chat.command(line)
    except SboraError as defect:
        return f"error: {defect}"


def _read_line(screen: Console) -> str | None:
    """None at the end of the input."""
    screen.print("> ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _evaluation_options(options: Mapping[str, str]) -> tuple[int, torch.dtype]:
    unknown = options.keys() - {"batch_size", "dtype"}
    size, dtype = options.get("batch_size", "8"), options.get("dtype", "float32")
    if unknown or not size.isdecimal() or int(size) < 1 or dtype not in ("float32", "bfloat16", "float16"):
        raise SboraError(f"got --set {dict(options)}", "batch_size is a number, dtype float32, bfloat16 or float16")
    return int(size), getattr(torch, dtype)
