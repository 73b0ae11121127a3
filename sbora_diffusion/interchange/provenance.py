"""Metadata of exported files for other programs: kohya's ss_ keys and modelspec."""

import json
from collections.abc import Mapping

from sbora_diffusion.adapters.basis import Spec

SPEC = "sbora.spec"  # the key of our own specification


def provenance(
    spec: Spec, layers: Mapping[str, tuple[int, int]], rank: int, resolution: int, date: str
) -> dict[str, str]:
    """Return metadata of an exported file: trigger words, base model, training, date, and our full specification.

    Args:
        layers: "<component>.<layer>" -> (out, in), of the base model.
        rank: the exported LoRA's.
        resolution: an image's side in pixels.
        date: today, ISO 8601.
    """
    version, architecture = base_model(layers, resolution)
    tokens, recipe = list(spec.tokens), spec.recipe
    metadata = {
        "ss_base_model_version": version,
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
        "ss_tag_frequency": json.dumps({spec.name: dict.fromkeys(tokens, 1)}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": spec.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": date,
        "modelspec.trigger_phrase": ", ".join(tokens),
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
