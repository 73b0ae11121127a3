"""Layer names of other programs."""

import re
from collections.abc import Iterable, Mapping

from sbora_diffusion.adapters.basis import canonical
from sbora_diffusion.adapters.file import COMPONENTS
from sbora_diffusion.utils.errors import SboraError

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def is_sdxl(layers: Iterable[str]) -> bool:
    """Return whether a model with these layers ("<component>.<layer>") is built like SDXL, with two text encoders."""
    return any(key.startswith("text_encoder_2.") for key in layers)


def diffusers_name(key: str) -> str:
    """Return diffusers' name of a layer.

    `text_encoder.encoder.layers.0.mlp.fc1` becomes `text_encoder.text_model.encoder.layers.0.mlp.fc1`: transformers
    dropped `text_model` from the names of CLIPTextModel in 5.6, files still have it.

    Raises:
        SboraError: the layer is in no U-Net, transformer or text encoder.
    """
    component, layer = _split(key, ("unet", "transformer", *TEXT_ENCODERS))
    return f"{component}.text_model.{layer}" if component in TEXT_ENCODERS else key


def kohya_name(key: str, sdxl: bool) -> str:
    """Return kohya's name of a layer: `unet.mid_block.attentions.0.proj_in` becomes
    `lora_unet_mid_block_attentions_0_proj_in`.

    Args:
        sdxl: use the original implementation's names of U-Net blocks, as kohya does for SDXL:
            `lora_unet_middle_block_1_proj_in`.

    Raises:
        SboraError: the layer is in no U-Net or text encoder; for SDXL, a U-Net layer is in no attention block.
    """
    component, layer = _split(key)
    if component == "unet":
        return "_".join(["lora_unet", *(_original_name(layer) if sdxl else layer).split(".")])
    number = {"text_encoder": "1" if sdxl else "", "text_encoder_2": "2"}[component]
    return "_".join([f"lora_te{number}_text_model", *layer.split(".")])


def peft_name(key: str, layers: Iterable[str]) -> str:
    """Return the name of the layer's module in its component, in transformers from 5.6 on.

    Encoders with a projection, which are all of SD3's and the second of SDXL's, still have `text_model`.

    Args:
        layers: all layers of the model, "<component>.<layer>".
    """
    component, _, layer = key.partition(".")
    components = {name.partition(".")[0] for name in layers}
    is_sd3 = {"transformer", "text_encoder_2"} <= components
    with_projection = component == "text_encoder_2" or (component == "text_encoder" and is_sd3)
    return f"text_model.{layer}" if with_projection else layer


def resolve(names: Iterable[str], layers: Mapping[str, object]) -> dict[str, str]:
    """Map layer names of any program to the layers "<component>.<layer>" of a model.

    Args:
        names: kohya's, or module names with or without their component in front.
        layers: the layers of the model.

    Raises:
        SboraError: a name matches no layer or two layers, or two names match one layer.
    """
    kohya = {kohya_name(key, is_sdxl(layers)): key for key in layers if key.partition(".")[0] in _COMPONENTS}
    found: dict[str, str] = {}
    for name in names:
        component, _, layer = name.partition(".")
        places, layer = ((component,), layer) if component in COMPONENTS else (COMPONENTS, name)
        candidates = [key for place in places if (key := f"{place}.{canonical(layer)}") in layers]
        candidates += [kohya[name]] if name in kohya else []
        if not candidates:
            problem = f"has the layer {name!r}, which the base model does not have, or which is never adapted"
            raise SboraError(problem, "Give its base model with --base.")
        if len(candidates) > 1:
            problem = f"layer {name} may be {' or '.join(candidates)}"
            raise SboraError(problem, "Name the folder after its component, such as text_encoder.")
        if candidates[0] in found.values():
            raise SboraError(f"holds the layer {candidates[0]} twice")
        found[name] = candidates[0]
    return found


_COMPONENTS = ("unet", *TEXT_ENCODERS)


def _split(key: str, components: tuple[str, ...] = _COMPONENTS) -> tuple[str, str]:
    component, _, layer = key.partition(".")
    if component not in components:
        raise SboraError(
            f"layer {key} belongs to a {component}, this format is for {', '.join(components)}",
            hint="Export to peft or diffusers." if component == "transformer" else "Export to peft.",
        )
    return component, layer


def _original_name(layer: str) -> str:
    """Return the original implementation's name of a U-Net attention layer; it numbers all blocks in one sequence."""
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", layer):
        return f"middle_block.1.{match[1]}"
    match = re.fullmatch(r"(down|up)_blocks\.([0-9]+)\.attentions\.([0-9]+)\.(.+)", layer)
    if match is None:
        raise SboraError(f"layer unet.{layer} has no known name in SDXL's kohya files: it is in no attention block")
    number = 3 * int(match[2]) + int(match[3])
    return f"input_blocks.{number + 1}.1.{match[4]}" if match[1] == "down" else f"output_blocks.{number}.1.{match[4]}"
