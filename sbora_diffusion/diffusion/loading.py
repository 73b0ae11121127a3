"""Where a base model lies and what family it is of: a folder, a model of the hub, or a short name for one."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import hf_hub_download

from sbora_diffusion.diffusion.families.family import Family
from sbora_diffusion.diffusion.families.known import ALIASES, family_named
from sbora_diffusion.errors import SboraError
from sbora_diffusion.hub import cache_if_offline, why

log = logging.getLogger(__name__)

EMBEDDED = "emoji64"
INDEX = "model_index.json"  # of every pipeline in diffusers' format: its class


def full_name(name: str) -> str:
    """What a short name such as sdxl stands for, unless there is a folder of this name; other names as they are."""
    return name if Path(name).exists() else ALIASES.get(name, name)


def recipe_base(name: str) -> str:
    """Whose recipes a base model's trainings follow: emoji64's, or its family's. No weights are loaded for it."""
    return EMBEDDED if name == EMBEDDED else find_family(name).name


def find_family(name: str) -> Family:
    """The family of a base model, by its settings alone.

    Raises:
        SboraError: neither a folder nor a model that can be reached, or of no family that is known.
    """
    path = Path(_path(name))
    with _told(name):
        index = path / INDEX if path.is_dir() else Path(hf_hub_download(name, INDEX))
        kind = json.loads(index.read_bytes())["_class_name"]
    return family_named(kind)


def load_pipeline(name: str) -> Any:
    """A pipeline in fp32, on the GPU if there is one, frozen.

    Raises:
        SboraError: as `find_family`.
    """
    family = find_family(name)
    options = {"safety_checker": None} if family.name == "sd" else {}
    with _told(name):
        pipeline: Any = DiffusionPipeline.from_pretrained(_path(name), dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    for module in family.modules(pipeline):
        module.requires_grad_(False).eval()
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _path(name: str) -> str:
    if name != EMBEDDED:
        return name
    folder = files("sbora_diffusion") / "emoji64" / "weights"
    if not folder.is_dir():
        raise SboraError("the emoji64 weights are not in this installation", "reinstall the package")
    return str(folder)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Say what is wrong with a base model in our own words."""
    try:
        with cache_if_offline():
            yield
    except (OSError, ValueError, KeyError) as error:
        raise SboraError(
            f"could not load base model {name!r}: {why(error)}",
            f"give emoji64, {', '.join(ALIASES)}, a folder in diffusers' format, or a hub id that can be reached",
        ) from error
