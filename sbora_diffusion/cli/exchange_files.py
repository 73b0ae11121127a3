"""The export and import commands: between concept files and those of other programs."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import check_base
from sbora_diffusion.interchange.exporting import export
from sbora_diffusion.interchange.importing import read_foreign, to_adapter
from sbora_diffusion.interchange.safefile import read_metadata
from sbora_diffusion.library.collisions import collisions
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import load_base
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

COLLISIONS = ("refuse", "keep")
NEXT = {
    "diffusers": 'pipeline.load_lora_weights("{folder}"), and the tokens in its embeddings/',
    "kohya": "put the file into ComfyUI's models/loras, and embeddings/ into models/embeddings",
    "peft": 'PeftModel.from_pretrained(pipeline.{denoiser}, "{folder}/{denoiser}"), and the tokens in its embeddings/',
}


def export_concept(
    name: str, to: str, base_name: str, *, library: Library, exports: Path, out: Path | None, force: bool
) -> list[Path]:
    """Export a concept by its name or file; what was written."""
    adapter = library.load(name)
    base = load_base(base_name or adapter.spec.base_id)
    check_base(adapter, base)
    paths = export(
        adapter,
        base.layer_shapes,
        to,
        folder := out or exports / f"{adapter.spec.name}-{to}",
        resolution=base.resolution,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        force=force,
    )
    log.info("next: %s; see docs/interchange.md", NEXT[to].format(folder=folder, denoiser=base.family.denoiser))
    return paths


def import_concept(
    path: Path,
    embeddings: Sequence[Path],
    name: str,
    noun: str,
    base_name: str,
    *,
    library: Library,
    collision: str,
    force: bool,
) -> Path:
    """Import a concept from a file or folder of another program, or from a concept file; where it was written.

    Args:
        collision: "refuse" columns that others in the library own, or "keep" both and say where they overlap.
    """
    if collision not in COLLISIONS:
        raise SboraError(f"got --collision {collision}, expected {' or '.join(COLLISIONS)}")
    adapter = _in_seed_of(library, _read(path, embeddings, name, noun, base_name))
    target = library.path(adapter.spec.name)
    if target.exists() and not force:
        raise SboraError(f"{target} exists", hint="Give it another name with --name, or overwrite it with --force.")
    with library.locked():  # nobody is given these columns between the look and the writing
        library.check_not_in_training(adapter.spec.name)
        _check_collisions(adapter, library, collision)
        adapter.save(target, force)
    _say_what_it_is(adapter)
    return target


def _check_collisions(adapter: Adapter, library: Library, collision: str) -> None:
    shared = collisions(adapter, library)
    if shared and collision == "refuse":
        raise SboraError(
            f"{adapter.spec.name} writes what others own ({'; '.join(shared)})",
            hint="Keep both with --collision keep (they then change the same weights), or train it anew into free "
            f"columns: sbora-diffusion train --concept {adapter.spec.name}",
        )
    for line in shared:
        log.warning("%s shares weights with %s", adapter.spec.name, line)


def _read(path: Path, embeddings: Sequence[Path], name: str, noun: str, base_name: str) -> Adapter:
    if path.is_file() and "sbora" in read_metadata(path):
        if embeddings:
            raise SboraError(f"{path}: is a concept file, which has its tokens in it", hint="Leave out --embedding.")
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
    return replace(adapter, spec=replace(adapter.spec, base_id=base.id))  # where the base lies here


def _in_seed_of(library: Library, adapter: Adapter) -> Adapter:
    """The adapter without intervals if they are of another seed's order: a library counts positions in one order."""
    spec = adapter.spec
    seeds = {owner.seed for owner in library.owners(spec.base_fingerprint, spec.side) if owner.name != spec.name}
    if not seeds or spec.seed in seeds:
        return adapter
    seed = min(seeds)
    if spec.intervals:
        log.warning("%s has its columns in the order of basis_seed %d, here it is %d", spec.name, spec.seed, seed)
    return replace(adapter, spec=replace(spec, seed=seed, intervals=()))


def _say_what_it_is(adapter: Adapter) -> None:
    spec = adapter.spec
    owned = ", ".join(map(str, spec.intervals)) or "columns of its own choice, which no interval describes"
    log.info("SBoRA-%s of rank %d, %d layers, owns %s", spec.side.upper(), spec.rank, len(adapter.factors), owned)
    log.info('next: sbora-diffusion generate "%s" --adapter %s', " and ".join(spec.tokens) or "…", spec.name)
