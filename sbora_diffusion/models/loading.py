"""Where a base model lies and what family it is of: a folder, a checkpoint, a model of the hub, a short name."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sbora_diffusion.models.distributed import shard
from sbora_diffusion.models.families.base import Family, Sampling
from sbora_diffusion.models.families.registry import ALIASES, family_named
from sbora_diffusion.utils.errors import SboraError, guess, interrupts_held

log = logging.getLogger(__name__)

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "nf4": torch.bfloat16}
EMBEDDED = "emoji64"
EMBEDDED_SAMPLING = Sampling(steps=20, guidance=3.0)
RECORD = "sbora.json"  # in a folder that `bake` wrote: what was baked
INDEX = "model_index.json"  # of every pipeline in diffusers' format: its class


def full_name(name: str) -> str:
    """What a short name such as sdxl stands for, unless there is a folder of this name; other names as they are."""
    return name if Path(name).exists() else ALIASES.get(name, name)


def find_kind(name: str) -> str:
    """Return "emoji64" or the name of a base model's family, without loading weights."""
    return EMBEDDED if is_emoji64(name) else find_family(name).name


recipe_base = find_kind  # its name until all rooms use the new one


def usual_sampling(name: str) -> Sampling:
    """How a base model's images are drawn where nobody says. No weights are loaded for it."""
    return EMBEDDED_SAMPLING if is_emoji64(name) else find_family(name).sampling


def is_emoji64(name: str) -> bool:
    """Whether a base model is the embedded one, perhaps with concepts baked into it."""
    if name == EMBEDDED:
        return True
    try:
        record = json.loads((Path(name) / RECORD).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and EMBEDDED in (record.get("kind"), record.get("base_id"))


def inference_precision(name: str, has_gpu: bool) -> str:
    """What images are drawn in where nobody says: on a GPU what the base model is trained in."""
    return find_family(name).inference_precision if has_gpu and not is_emoji64(name) else "fp32"


def find_family(name: str) -> Family:
    """The family of a base model, by its settings alone.

    Raises:
        SboraError: neither a folder nor a model that can be reached, or of no family that is known.
    """
    settings = settings_of(Path(name)) if Path(name).is_file() else _path(name)
    with _told(name):
        folder = Path(settings)
        index = folder / INDEX if folder.is_dir() else Path(hf_hub_download(settings, INDEX))
        kind = json.loads(index.read_bytes())["_class_name"]
    return family_named(kind)


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline in fp32 on the CPU, frozen.

    Args:
        dtype: what its weights will be rounded to (`to_half`): components that are stored in it are left in it, for
            in fp32 they would take twice the memory for nothing.

    Raises:
        SboraError: as `find_family`.
    """
    family = find_family(name)
    with interrupts_held(), _told(name):
        pipeline = _load(name, family, dtype)
    pipeline.set_progress_bar_config(disable=True)
    for reader in family.present(pipeline):
        _tell_the_end(getattr(pipeline, reader.component), getattr(pipeline, reader.tokenizer))
    for module in family.modules(pipeline):
        module.requires_grad_(False).eval()
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # convolutions are faster so
    return pipeline


def _tell_the_end(encoder: Any, tokenizer: Any) -> None:
    """Let a CLIP sum its prompt up at the token that ends it.

    Published settings say 2 for that token's id, by an old mistake; a CLIP of which this is said looks at the highest
    id of a prompt, and where a learned token is there, at that: whatever is said after it would be lost.
    """
    if getattr(encoder.config, "eos_token_id", None) == 2 != tokenizer.eos_token_id:
        for part in (encoder.config, *encoder.modules()):
            if getattr(part, "eos_token_id", None) == 2:
                part.eos_token_id = tokenizer.eos_token_id


def to_device(pipeline: Any, family: Family, sharded: bool = False) -> None:
    """Move it to the GPU, if there is one.

    Args:
        sharded: of what is frozen only this process's share; every process calls this alike.
    """
    frozen = family.frozen(pipeline)
    for module in family.modules(pipeline):
        if sharded and module in frozen:
            shard(module)
        else:
            module.to("cuda" if torch.cuda.is_available() else "cpu")


def to_half(pipeline: Any, family: Family, dtype: torch.dtype) -> None:
    """Round all weights but the autoencoder's to half precision; it keeps decoding in fp32, for fp16 overflows there.

    The pipeline is to be used under autocast: learned tokens and adapters are fp32 all the same.
    """
    for module in family.modules(pipeline):
        if module is not pipeline.vae:
            nn.Module.to(module, dtype)  # diffusers' own warns of an empty list
    decode = pipeline.vae.decode

    def decode_in_fp32(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.float(), *args, **kwargs)

    pipeline.vae.decode = decode_in_fp32


def _load(name: str, family: Family, dtype: torch.dtype) -> Any:
    if Path(name).is_file():
        return load_checkpoint(Path(name), family.pipeline)
    options = {"safety_checker": None} if family.name == "sd" else {}
    folder = fetched(_path(name), **options)
    halves = [] if dtype == torch.float32 else [part for part in stored_in(folder, dtype) if part != "vae"]
    types = dict.fromkeys(halves, dtype) | {"default": torch.float32}
    return DiffusionPipeline.from_pretrained(folder, dtype=types, **options)


def embedded_folder() -> Path:
    """Where the embedded base model lies."""
    folder = Path(str(files("sbora_diffusion") / "emoji" / "weights"))
    if not folder.is_dir():
        raise SboraError("the emoji64 weights are not in this installation", "reinstall the package")
    return folder


def _path(name: str) -> str:
    return str(embedded_folder()) if name == EMBEDDED else name


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Say what is wrong with a base model in our own words."""
    offline = nullcontext()
    if name != EMBEDDED:
        from sbora_diffusion.utils.hub import cache_if_offline

        offline = cache_if_offline()
    try:
        with offline:
            yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        from sbora_diffusion.utils.hub import why

        raise SboraError(f"could not load base model {name!r}: {why(error, _path(name))}", _what_to_do(name)) from error


def _what_to_do(name: str) -> str:
    if not Path(name).is_file():
        elsewhere = "a folder in diffusers' format, a .safetensors file"
        if name in (*ALIASES, *ALIASES.values()):
            return f"load it once with a network, or give {elsewhere} or {EMBEDDED}, which comes with the package"
        known = (EMBEDDED, *ALIASES)
        return f"{guess(name, known)}give {', '.join(known)}, {elsewhere}, or a hub id that can be reached"
    kind = settings_of(Path(name))
    return (
        f"a checkpoint has weights only: put the other files of a pipeline of its kind ({kind}), in diffusers' "
        f"format, into {Path(name).with_suffix('')}/ beside it"
    )


_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fetched(name: str, **options: Any) -> Path:
    """The folder of a pipeline in diffusers' format: itself, or where a model of the hub is kept.

    Args:
        options: those of `from_pretrained` that say which components are not wanted.
    """
    return Path(name) if Path(name).is_dir() else Path(DiffusionPipeline.download(name, **options))


def stored_in(folder: Path, dtype: torch.dtype) -> list[str]:
    """The components whose files hold numbers of this type only, so that reading them in it rounds nothing."""
    return [part.name for part in sorted(folder.iterdir()) if part.is_dir() and _types(part) == {dtype}]


def _types(part: Path) -> set[torch.dtype | None]:
    """Of everything in a component's files; None stands for types that are not floating point numbers."""
    found: set[torch.dtype | None] = set()
    for path in part.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {_TYPES.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    return found


def settings_of(checkpoint: Path) -> str:
    """Where the settings of a checkpoint's pipeline are: a folder beside it, or a model of the hub.

    The folder is named as the file is, without its ending: `dream.safetensors` and `dream/`. It is what a pipeline of
    the same kind is in diffusers' format; weights in it are not read, and need not be there.

    Raises:
        SboraError: no safetensors file, or of a kind that diffusers does not know.
    """
    shapes = _shapes(checkpoint)
    beside = checkpoint.with_suffix("")
    if (beside / "model_index.json").is_file():
        return str(beside)
    kind = infer_diffusers_model_type(shapes)
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def load_checkpoint(checkpoint: Path, pipeline: str) -> Any:
    """A pipeline in fp32.

    Args:
        pipeline: the name of its class in diffusers.

    Raises:
        SboraError: a part is missing in the file, or does not have the shape that the settings say.
    """
    settings = settings_of(checkpoint)
    try:
        return getattr(diffusers, pipeline).from_single_file(
            str(checkpoint), config=settings, torch_dtype=torch.float32
        )
    except (SingleFileComponentError, RuntimeError) as error:
        raise SboraError(
            f"base model {checkpoint} does not hold what {settings} describes: {str(error).splitlines()[0]}",
            "use a complete checkpoint (with text encoders and autoencoder), or a folder in diffusers' format",
        ) from error


def _shapes(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors without their numbers."""
    try:
        with safe_open(checkpoint, framework="pt") as file:
            names = list(file.keys())
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise SboraError(
            f"base model {checkpoint} cannot be read as safetensors ({error})",
            "convert pickled files (.ckpt, .pt, .bin) first",
        ) from None
