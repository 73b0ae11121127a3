"""Which layers of the base model a training adapts, and the blocks in which it therefore needs no gradient."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError


def adapted_layers(base: Base, config: TrainConfig) -> dict[str, list[str]]:
    """Component -> canonical names of its trained layers.

    No text encoder's at a rate of 0, and of the denoiser's those within `blocks`, or all if it names none.

    Raises:
        SboraError: a block without such layers.
    """
    found: dict[str, list[str]] = {}
    for key in base.layers:
        component, _, layer = key.partition(".")
        found.setdefault(component, []).append(layer)
    denoiser = found.pop(base.family.denoiser)
    for block in config.method.blocks:
        if not _within(denoiser, [block]):
            known = ", ".join(sorted({layer.partition(".")[0] for layer in denoiser}))
            raise SboraError(f"got blocks={block}, which has no attention", f"choose from {known}, or a block in them")
    texts = found if config.optim.text_encoder_learning_rate else {}
    return {base.family.denoiser: _within(denoiser, config.method.blocks) if config.method.blocks else denoiser} | texts


def _within(layers: Sequence[str], blocks: Sequence[str]) -> list[str]:
    return [layer for layer in layers if layer.startswith(tuple(f"{block}." for block in blocks))]


def blocks_before(base: Base, config: TrainConfig) -> list[str]:
    """Names of a U-Net's blocks, in the order of its pass, that come before the first one of `config.method.blocks`."""
    if base.family.denoiser != "unet" or not config.method.blocks:
        return []
    return unet_blocks_before(base.denoiser, adapted_layers(base, config)["unet"])


def unet_blocks_before(unet: Any, layers: Sequence[str]) -> list[str]:
    """Names of the blocks that a U-Net passes before the first one with one of these layers."""
    down, up = ([f"{part}.{n}" for n in range(len(getattr(unet, part)))] for part in ("down_blocks", "up_blocks"))
    middle = [] if unet.mid_block is None else ["mid_block"]
    return list(takewhile(lambda name: not _within(layers, [name]), down + middle + up))


@contextmanager
def only_passed(denoiser: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Meanwhile these blocks answer as ever, and no gradient goes through them: nothing is kept, no backward pass.

    They read the concept's token, too; it learns from the blocks that can change.
    """
    with ExitStack() as stack:
        for name in blocks:
            hook = denoiser.get_submodule(name).register_forward_pre_hook(_detached, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _detached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    cut = {key: value.detach() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in args), cut
