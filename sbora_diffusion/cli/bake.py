"""The bake command: concept files in, a whole pipeline folder out."""

import logging
from collections.abc import Sequence
from pathlib import Path

from sbora_diffusion.inference.bake import bake
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import load_base

log = logging.getLogger(__name__)


def bake_concepts(
    names: Sequence[str],
    strengths: Sequence[float],
    base_name: str,
    out: Path | None,
    *,
    library: Library,
    pipelines: Path,
    force: bool,
) -> Path:
    """Write concepts into a copy of their base model; the folder of the new pipeline.

    Args:
        base_name: "" is what the first concept was trained for.
        out: None is a folder in `pipelines`, by the names.
    """
    adapters = [library.load(name) for name in names]
    folder = out or pipelines / "+".join(adapter.spec.name for adapter in adapters)
    tokens = bake(load_base(base_name or adapters[0].spec.base_id), adapters, strengths, folder, force)
    log.info('next: sbora-diffusion generate "%s" --base %s', " and ".join(f"a {token}" for token in tokens), folder)
    log.info('or, in Python: DiffusionPipeline.from_pretrained("%s", safety_checker=None)', folder)
    return folder
