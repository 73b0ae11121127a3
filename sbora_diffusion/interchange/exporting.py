"""Export an adapter as a folder of files that other programs load."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from sbora_diffusion.adapters.basis import Spec
from sbora_diffusion.adapters.file import COMPONENTS, Adapter, safetensors_bytes
from sbora_diffusion.interchange.embeddings import Embedding, embedding_file
from sbora_diffusion.interchange.files import CONFIG, WEIGHTS, diffusers_file, kohya_file, peft_component
from sbora_diffusion.interchange.lora import common_rank, to_loras
from sbora_diffusion.interchange.names import is_sdxl
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import write_file

Format = Literal["diffusers", "kohya", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)
EMBEDDINGS = "embeddings"  # the folder of learned tokens, beside the LoRA
SPEC = "sbora.spec"  # the metadata with our own specification
LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers' own default


def export(
    adapter: Adapter,
    layer_shapes: Mapping[str, tuple[int, int]],
    to: str,
    folder: Path,
    *,
    resolution: int,
    date: str,
    force: bool = False,
) -> list[Path]:
    """Write an adapter in the format of other programs, as one LoRA with the scale folded in and alpha = rank.

    Args:
        layer_shapes: "<component>.<layer>" -> (out, in), of the base model's layers.
        to: one of `FORMATS`.
        resolution, date: for the metadata: an image's side in pixels, and today as ISO 8601.

    Returns:
        The files: `pytorch_lora_weights.safetensors` (diffusers), `<name>.safetensors` (kohya) or a directory for each
        component (peft), and `embeddings/<token>.safetensors` for each learned token.

    Raises:
        SboraError: the adapter does not fit the layers, a file exists and `force` is false, the format has no name for
            a component, tokens have embeddings for each layer, or a change is no LoRA. Nothing is written then.
    """
    if to not in FORMATS:
        raise SboraError(f"got format {to!r}, expected one of {', '.join(FORMATS)}")
    if adapter.spec.embedding_layers:
        raise SboraError(
            f"the token of {adapter.spec.name!r} has embeddings for each layer, which other programs cannot load",
            "Train with --set layerwise_tokens=false.",
        )
    loras = to_loras(adapter, layer_shapes)
    about = provenance(adapter.spec, layer_shapes, common_rank(loras), resolution, date, kohya=to == "kohya")
    if to == "peft":
        files = {}
        for component in sorted({key.partition(".")[0] for key in loras}):
            own = {key: lora for key, lora in loras.items() if key.startswith(f"{component}.")}
            config, tensors = peft_component(own, adapter.spec.base_id, layer_shapes)
            files[f"{component}/{CONFIG}"] = config.encode()
            files[f"{component}/{WEIGHTS}"] = safetensors_bytes(tensors, {**about, "format": "pt"})
    elif to == "kohya":
        tensors = kohya_file(loras, sdxl=is_sdxl(layer_shapes))
        files = {f"{_slug(adapter.spec.name)}.safetensors": safetensors_bytes(tensors, about)}
    else:
        files = {LORA_NAME: safetensors_bytes(*diffusers_file(loras, about))}
    files |= _embeddings(adapter, kohya=to == "kohya")
    existing = [folder / name for name in files if (folder / name).exists()]
    if existing and not force:
        raise SboraError(f"{existing[0]} exists", hint="Choose another folder, or overwrite it with --force.")
    for name, content in files.items():
        write_file(folder / name, content, overwrite=True)
    return [folder / name for name in files]


def _embeddings(adapter: Adapter, *, kohya: bool) -> dict[str, bytes]:
    files = {}
    for token, noun in adapter.spec.tokens.items():
        places = {component: f"{component}.{token}" for component in COMPONENTS}
        vectors = {component: adapter.tokens[key] for component, key in places.items() if key in adapter.tokens}
        if vectors:
            name = f"{EMBEDDINGS}/{_slug(token)}.safetensors"
            if name in files:
                raise SboraError(f"two tokens would be written to {name}", hint="Export the concepts one by one.")
            files[name] = safetensors_bytes(*embedding_file(Embedding(token, noun, vectors), kohya=kohya))
    return files


def _slug(text: str) -> str:
    """Return a file name without brackets and spaces: in ComfyUI, prompts contain it."""
    return re.sub(r"[^\w+-]+", "-", text).strip("-") or "token"


def provenance(
    spec: Spec, layers: Mapping[str, tuple[int, int]], rank: int, resolution: int, date: str, *, kohya: bool
) -> dict[str, str]:
    """Return an exported file's metadata for kohya (ss_), modelspec and ourselves; arguments as in `export`.

    Triggers are the words of the format's programs: A1111 names a token by its file, `dog`, diffusers by `<dog>`.
    """
    version, architecture = base_model(layers, resolution)
    triggers, recipe = [_slug(token) if kohya else token for token in spec.tokens], spec.recipe
    metadata = {
        "ss_base_model_version": version,
        "ss_v2": "True" if version == "sd_v2" else "",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_sd_model_name": spec.base_id,
        "ss_sd_model_hash": spec.base_fingerprint,
        "ss_output_name": spec.name,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_steps": str(recipe.get("steps", "")),
        "ss_unet_lr": str(recipe.get("learning_rate", "")),
        "ss_text_encoder_lr": str(recipe.get("text_encoder_learning_rate", "")),
        "ss_seed": str(recipe.get("seed", "")),
        "ss_tag_frequency": json.dumps({spec.name: dict.fromkeys(triggers, 1)}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": spec.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": date,
        "modelspec.trigger_phrase": ", ".join(triggers),
        "modelspec.tags": ", ".join(dict.fromkeys(spec.tokens.values())),
        "modelspec.merged_from": ", ".join(spec.parents),
        SPEC: spec.to_json(),
    }
    return {key: value for key, value in metadata.items() if value}


def base_model(layers: Mapping[str, tuple[int, int]], resolution: int) -> tuple[str, str]:
    """Return the base model's names for kohya and modelspec, from its components and its text embeddings' width."""
    components = {key.partition(".")[0] for key in layers}
    has_two_encoders = "text_encoder_2" in components
    if "transformer" in components:
        return ("sd3", "stable-diffusion-3") if has_two_encoders else ("flux1", "flux-1-dev")
    if has_two_encoders:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    width = max((shape[1] for key, shape in layers.items() if key.endswith("attn2.to_k")), default=768)
    if width == 1024:
        return "sd_v2", "stable-diffusion-v2-768-v" if resolution >= 768 else "stable-diffusion-v2-512"
    return "sd_v1", "stable-diffusion-v1"
