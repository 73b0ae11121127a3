"""What other programs call the layers that adapters write."""

import re
from collections.abc import Iterable, Mapping

from sbora_diffusion.adapters.basis import canonical
from sbora_diffusion.adapters.file import COMPONENTS
from sbora_diffusion.utils.errors import SboraError

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def is_sdxl(layers: Iterable[str]) -> bool:
    """Whether a model with these layers ("<component>.<layer>") is built like SDXL: it has two text encoders."""
    return any(key.startswith("text_encoder_2.") for key in layers)


def diffusers_name(key: str) -> str:
    """`text_encoder.encoder.layers.0.mlp.fc1` is `text_encoder.text_model.encoder.layers.0.mlp.fc1` in diffusers.

    transformers dropped `text_model` from the names of CLIPTextModel in 5.6; files go on having it.

    Raises:
        SboraError: a layer of another component than U-Net, transformer and text encoders.
    """
    component, layer = _split(key, ("unet", "transformer", *TEXT_ENCODERS))
    return f"{component}.text_model.{layer}" if component in TEXT_ENCODERS else key


def kohya_name(key: str, sdxl: bool) -> str:
    """`unet.mid_block.attentions.0.proj_in` is `lora_unet_mid_block_attentions_0_proj_in` in kohya's files.

    Args:
        sdxl: whether U-Net blocks have the names of the original implementation, as those of SDXL have in these files:
            `lora_unet_middle_block_1_proj_in`.

    Raises:
        SboraError: a layer of another component than U-Net and text encoders; for SDXL, one outside the attentions.
    """
    component, layer = _split(key)
    if component == "unet":
        return "_".join(["lora_unet", *(_original_name(layer) if sdxl else layer).split(".")])
    number = {"text_encoder": "1" if sdxl else "", "text_encoder_2": "2"}[component]
    return "_".join([f"lora_te{number}_text_model", *layer.split(".")])


def peft_name(key: str, layers: Iterable[str]) -> str:
    """The name of the layer's module in its component, in transformers from 5.6 on.

    Encoders with a projection, which are all of SD3's and the second of SDXL's, have kept `text_model`.

    Args:
        layers: all of the model, "<component>.<layer>".
    """
    component, _, layer = key.partition(".")
    components = {name.partition(".")[0] for name in layers}
    is_sd3 = {"transformer", "text_encoder_2"} <= components
    with_projection = component == "text_encoder_2" or (component == "text_encoder" and is_sd3)
    return f"text_model.{layer}" if with_projection else layer


def resolve(names: Iterable[str], layers: Mapping[str, object]) -> dict[str, str]:
    """The layers "<component>.<layer>" of a model that names in anybody's file stand for.

    Args:
        names: kohya's, or modules with or without their component in front.
        layers: what the model has.

    Raises:
        SboraError: a name of no layer, of two layers, or two names of one layer.
    """
    kohya = {kohya_name(key, is_sdxl(layers)): key for key in layers if key.partition(".")[0] in _COMPONENTS}
    found: dict[str, str] = {}
    for name in names:
        component, _, layer = name.partition(".")
        places = COMPONENTS if component not in COMPONENTS else (component,)
        layer = layer if component in COMPONENTS else name
        candidates = [key for place in places if (key := f"{place}.{canonical(layer)}") in layers]
        candidates += [kohya[name]] if name in kohya else []
        if len(candidates) != 1:
            raise _not_one(name, candidates)
        if candidates[0] in found.values():
            raise SboraError(f"holds the layer {candidates[0]} twice")
        found[name] = candidates[0]
    return found


def _not_one(name: str, candidates: list[str]) -> SboraError:
    if candidates:
        return SboraError(
            f"layer {name} may be {' or '.join(candidates)}", hint="Name the folder after its component: text_encoder."
        )
    return SboraError(
        f"has the layer {name!r}, which the base model has not, or which adapters do not write",
        hint="Name its base model with --base.",
    )


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
    """The original implementation's name of an attention layer in the U-Net; it counts the blocks through."""
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", layer):
        return f"middle_block.1.{match[1]}"
    match = re.fullmatch(r"(down|up)_blocks\.([0-9]+)\.attentions\.([0-9]+)\.(.+)", layer)
    if match is None:
        raise SboraError(f"layer unet.{layer} has no known name in SDXL's kohya files: it is in no attention block")
    number = 3 * int(match[2]) + int(match[3])
    return f"input_blocks.{number + 1}.1.{match[4]}" if match[1] == "down" else f"output_blocks.{number}.1.{match[4]}"
