"""The layers of a base model that a training adapts, and the blocks that need no gradient because of that."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sbora_diffusion.utils.errors import SboraError

if TYPE_CHECKING:
    from sbora_diffusion.models.base import Base


def adapted_layers(base: "Base", blocks: Sequence[str] = (), *, text_encoders: bool = True) -> dict[str, list[str]]:
    """Return component -> canonical names of the layers to train.

    Args:
        blocks: prefixes of the denoiser's layers to adapt; empty for all.
        text_encoders: whether the text encoders' layers are adapted, too.

    Raises:
        SboraError: a block without such layers.
    """
    found: dict[str, list[str]] = {}
    for key in base.layers:
        component, _, layer = key.partition(".")
        found.setdefault(component, []).append(layer)
    denoiser = found.pop(base.family.denoiser)
    for block in blocks:
        if not _within(denoiser, [block]):
            known = ", ".join(sorted({layer.partition(".")[0] for layer in denoiser}))
            raise SboraError(f"got blocks={block}, which has no attention", f"choose from {known}, or a block in them")
    return {base.family.denoiser: _within(denoiser, blocks) if blocks else denoiser} | (found if text_encoders else {})


def _within(layers: Sequence[str], blocks: Sequence[str]) -> list[str]:
    return [layer for layer in layers if layer.startswith(tuple(f"{block}." for block in blocks))]


def blocks_before(base: "Base", blocks: Sequence[str]) -> list[str]:
    """Return the names of a U-Net's blocks that its forward pass computes before the first of `blocks`."""
    if base.family.denoiser != "unet" or not blocks:
        return []
    return unet_blocks_before(base.denoiser, adapted_layers(base, blocks)["unet"])


def unet_blocks_before(unet: Any, layers: Sequence[str]) -> list[str]:
    """Return the names of the blocks that a U-Net computes before the first one with one of these layers."""
    down, up = ([f"{part}.{n}" for n in range(len(getattr(unet, part)))] for part in ("down_blocks", "up_blocks"))
    middle = [] if unet.mid_block is None else ["mid_block"]
    return list(takewhile(lambda name: not _within(layers, [name]), down + middle + up))


@contextmanager
def only_passed(denoiser: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Cut the gradient at the inputs of these blocks inside the context; their outputs stay the same.

    They save no activations and need no backward pass. The concept's token learns from the other blocks only.
    """
    with ExitStack() as stack:
        for name in blocks:
            hook = denoiser.get_submodule(name).register_forward_pre_hook(_detach_inputs, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _detach_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    cut = {key: value.detach() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in args), cut


def repeated_blocks(model: Any) -> dict[str, nn.Module]:
    """By name, outer ones before those within them."""
    kinds = set(model._no_split_modules or ())
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
