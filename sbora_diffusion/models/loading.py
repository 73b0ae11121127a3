"""Find and load the pipeline of a base model: the embedded one, a folder, a checkpoint, a hub model, a short name."""

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

from sbora_diffusion.models.families import ALIASES, family_named
from sbora_diffusion.models.families.base import Family, Sampling
from sbora_diffusion.utils.errors import SboraError, guess, interrupts_held
from sbora_diffusion.utils.files import read_bytes, read_json
from sbora_diffusion.utils.hub import cache_if_offline, check_no_pickles, only_safetensors, pickle_hint, why
from sbora_diffusion.utils.text import parse_json

log = logging.getLogger(__name__)

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "nf4": torch.bfloat16}
EMBEDDED = "emoji64"
EMBEDDED_SAMPLING = Sampling(steps=20, guidance=3.0)
RECORD = "sbora.json"  # in a folder that `bake` wrote: what was baked
INDEX = "model_index.json"  # of every pipeline in diffusers' format: its class


def full_name(name: str) -> str:
    """Resolve a short name such as sdxl, unless there is a folder of this name; return other names as they are."""
    return name if Path(name).exists() else ALIASES.get(name, name)


def find_kind(name: str) -> str:
    """Return "emoji64" or the name of a base model's family, without loading weights."""
    return EMBEDDED if is_emoji64(name) else find_family(name).name


recipe_base = find_kind  # its name until all rooms use the new one


def usual_sampling(name: str) -> Sampling:
    """Return a base model's default sampling, without loading weights."""
    return EMBEDDED_SAMPLING if is_emoji64(name) else find_family(name).sampling


def is_emoji64(name: str) -> bool:
    """Return whether a base model is the embedded one, perhaps with concepts baked into it."""
    if name == EMBEDDED:
        return True
    try:
        record = read_json(Path(name) / RECORD)
    except (OSError, SboraError):
        return False
    return isinstance(record, dict) and EMBEDDED in (record.get("kind"), record.get("base_id"))


def inference_precision(name: str, has_gpu: bool) -> str:
    """Return the default precision of generation: on a GPU the one that the base model is trained in."""
    return find_family(name).inference_precision if has_gpu and not is_emoji64(name) else "fp32"


def find_family(name: str) -> Family:
    """Return the family of a base model, without loading weights.

    Raises:
        SboraError: neither a folder nor a model that can be reached, or of an unknown family.
    """
    settings = settings_of(Path(name)) if Path(name).is_file() else _path(name)
    with _clear_errors(name):
        folder = Path(settings)
        index = folder / INDEX if folder.is_dir() else Path(hf_hub_download(settings, INDEX))
        kind = parse_json(read_bytes(index))["_class_name"]
    return family_named(kind)


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline in fp32 on the CPU, frozen.

    Args:
        dtype: what `to_half` will round its weights to: components stored in it stay in it, which halves their memory.

    Raises:
        SboraError: as `find_family`.
    """
    family = find_family(name)
    with interrupts_held(), _clear_errors(name):
        pipeline = _load(name, family, dtype)
    pipeline.set_progress_bar_config(disable=True)
    for reader in family.present(pipeline):
        _fix_eos_token(getattr(pipeline, reader.component), getattr(pipeline, reader.tokenizer))
    for module in family.modules(pipeline):
        module.requires_grad_(False).eval()
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # convolutions are faster so
    return pipeline


def _fix_eos_token(encoder: Any, tokenizer: Any) -> None:
    """Fix legacy `eos_token_id=2`, so that pooling uses the real EOS token.

    With 2, transformers' CLIP pools at a prompt's highest id: at a learned token, ignoring everything after it.
    """
    if getattr(encoder.config, "eos_token_id", None) == 2 != tokenizer.eos_token_id:
        for part in (encoder.config, *encoder.modules()):
            if getattr(part, "eos_token_id", None) == 2:
                part.eos_token_id = tokenizer.eos_token_id


def to_device(pipeline: Any, family: Family, sharded: bool = False) -> None:
    """Move a pipeline to the GPU if there is one; with `sharded`, in all processes, only a shard of what is frozen."""
    frozen = family.frozen(pipeline)
    for module in family.modules(pipeline):
        if sharded and module in frozen:
            from sbora_diffusion.models.distributed import shard

            shard(module)
        else:
            module.to("cuda" if torch.cuda.is_available() else "cpu")


def to_half(pipeline: Any, family: Family, dtype: torch.dtype) -> None:
    """Round all weights but the autoencoder's to half precision; it keeps decoding in fp32, as fp16 overflows there.

    Use the pipeline under autocast: learned tokens and adapters are fp32.
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
    options: dict[str, Any] = {"use_safetensors": only_safetensors()}
    if family.name == "sd":
        options["safety_checker"] = None
    folder = fetched(_path(name), **options)
    components = read_json(folder / INDEX)
    check_no_pickles(*(folder / part for part in components if part not in options))
    halves = [] if dtype == torch.float32 else [part for part in stored_in(folder, dtype) if part != "vae"]
    types = dict.fromkeys(halves, dtype) | {"default": torch.float32}
    return DiffusionPipeline.from_pretrained(folder, dtype=types, **options)


def embedded_folder() -> Path:
    """Return the folder of the embedded base model."""
    folder = Path(str(files("sbora_diffusion") / "emoji" / "weights"))
    if not folder.is_dir():
        raise SboraError("the emoji64 weights are not in this installation", "reinstall the package")
    return folder


def _path(name: str) -> str:
    return str(embedded_folder()) if name == EMBEDDED else name


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Turn the libraries' errors into one that says what to do."""
    offline = nullcontext()
    if name != EMBEDDED:
        offline = cache_if_offline()
    try:
        with offline:
            yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = pickle_hint(error) or _hint(name)
        raise SboraError(f"could not load base model {name!r}: {why(error, _path(name))}", hint) from error


def _hint(name: str) -> str:
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


def fetched(name: str, **options: Any) -> Path:
    """Return the folder of a pipeline, downloading a hub model; `options` of `from_pretrained` exclude components."""
    return Path(name) if Path(name).is_dir() else Path(DiffusionPipeline.download(name, **options))


def stored_in(folder: Path, dtype: torch.dtype) -> list[str]:
    """List the components whose files hold only this type, so that loading them in it rounds nothing."""
    code = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    return [part.name for part in sorted(folder.iterdir()) if part.is_dir() and _stored_types(part) == {code}]


def _stored_types(part: Path) -> set[str]:
    found: set[str] = set()
    for path in part.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return found


def settings_of(checkpoint: Path) -> str:
    """Return where a checkpoint's other files are: the folder beside it without its ending, or else a hub model.

    The folder is a pipeline of the same kind in diffusers' format; its weights are not read and may be absent.

    Raises:
        SboraError: not a safetensors file.
    """
    try:
        with safe_open(checkpoint, framework="pt") as file:
            shapes = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise SboraError(
            f"base model {checkpoint} cannot be read as safetensors ({error})",
            "convert pickled files (.ckpt, .pt, .bin) first",
        ) from None
    beside = checkpoint.with_suffix("")
    if (beside / INDEX).is_file():
        return str(beside)
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[infer_diffusers_model_type(shapes)]["pretrained_model_name_or_path"]


def load_checkpoint(checkpoint: Path, pipeline: str) -> Any:
    """Load a checkpoint in fp32 as a pipeline of this class of diffusers.

    Raises:
        SboraError: a part that the file lacks, or that has another shape than its settings.
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
