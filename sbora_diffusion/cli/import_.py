"""`sbora-diffusion import`: a concept file from the files of another program."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbora_diffusion.cli.console import ADAPTERS, Force, hide_loading_bars, prompt_of, suggest
from sbora_diffusion.utils.errors import SboraError

if TYPE_CHECKING:
    from sbora_diffusion.adapters.file import Adapter
    from sbora_diffusion.library.library import Library

log = logging.getLogger(__name__)

COLLISIONS = ("refuse", "keep")


def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A LoRA file, a PEFT folder, or a concept file.")],
    embedding: Annotated[list[Path], typer.Option(metavar="FILE", help="A learned token; repeatable.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the concept; default: as in the file.")] = "",
    noun: Annotated[str, typer.Option(metavar="WORD", help="Class noun of tokens whose files have none.")] = "",
    base: Annotated[str, typer.Option(metavar="ID", help="Default: as in the file.")] = "",
    collision: Annotated[
        str, typer.Option(metavar="refuse|keep", help="If others in ./adapters own the same columns.")
    ] = "refuse",
    force: Force = False,
) -> None:
    """Import a concept that was trained elsewhere, if it is an SBoRA adapter: writes adapters/NAME.safetensors."""
    from sbora_diffusion.library.library import Library

    if collision not in COLLISIONS:
        raise SboraError(f"got --collision {collision}, expected {' or '.join(COLLISIONS)}")
    hide_loading_bars()
    library = Library(ADAPTERS)
    adapter = _in_seed_of(library, _read(path, embedding, name, noun, base))
    target = library.path(adapter.spec.name)
    if target.exists() and not force:
        raise SboraError(f"{target} exists", hint="Give it another name with --name, or overwrite it with --force.")
    with library.locked():  # nobody can reserve these columns between the check and the write
        library.check_not_in_training(adapter.spec.name)
        _check_collisions(adapter, library, collision)
        adapter.save(target, force)
    _log_summary(adapter)
    typer.echo(target)


def _read(path: Path, embeddings: Sequence[Path], name: str, noun: str, base_name: str) -> "Adapter":
    from sbora_diffusion.adapters.file import Adapter
    from sbora_diffusion.inference.generate import check_base
    from sbora_diffusion.interchange.files import read_metadata
    from sbora_diffusion.interchange.importing import read_foreign, to_adapter
    from sbora_diffusion.models.base import load_base

    if path.is_file() and "sbora" in read_metadata(path):
        if embeddings:
            raise SboraError(f"{path}: is a concept file, which contains its tokens", hint="Leave out --embedding.")
        adapter = Adapter.load(path)
        return replace(adapter, spec=replace(adapter.spec, name=name or adapter.spec.name))
    foreign = read_foreign(path, embeddings)
    base_name = base_name or (foreign.spec.base_id if foreign.spec else "")
    if not base_name:
        raise SboraError(f"{path}: does not say what base model it is for", hint="Name it with --base.")
    base = load_base(base_name)
    name = name or (foreign.spec.name if foreign.spec else path.stem)
    adapter = to_adapter(foreign, base.layer_shapes, (base.id, base.fingerprint), name, noun)
    check_base(adapter, base)
    return replace(adapter, spec=replace(adapter.spec, base_id=base.id))  # its path on this machine


def _in_seed_of(library: "Library", adapter: "Adapter") -> "Adapter":
    """Drop the adapter's intervals if they count in the order of another seed than the library's."""
    spec = adapter.spec
    seeds = {owner.seed for owner in library.owners(spec.base_fingerprint, spec.side) if owner.name != spec.name}
    if not seeds or spec.seed in seeds:
        return adapter
    seed = min(seeds)
    if spec.intervals:
        log.warning(
            "%s counts its columns in the order of basis_seed %d, this folder in %d", spec.name, spec.seed, seed
        )
    return replace(adapter, spec=replace(spec, seed=seed, intervals=()))


def _check_collisions(adapter: "Adapter", library: "Library", collision: str) -> None:
    from sbora_diffusion.library.library import collisions

    shared = collisions(adapter, library)
    if shared and collision == "refuse":
        raise SboraError(
            f"{adapter.spec.name} writes what others own ({'; '.join(shared)})",
            hint="Keep both with --collision keep (they then change the same weights), or train it anew into free "
            f"columns: sbora-diffusion train --concept {adapter.spec.name}",
        )
    for line in shared:
        log.warning("%s shares weights with %s", adapter.spec.name, line)


def _log_summary(adapter: "Adapter") -> None:
    spec = adapter.spec
    owned = ", ".join(map(str, spec.intervals)) or "columns of its own choice, which no interval describes"
    log.info("SBoRA-%s of rank %d, %d layers, owns %s", spec.side.upper(), spec.rank, len(adapter.factors), owned)
    suggest("generate", prompt_of(spec.tokens), "--adapter", spec.name)
