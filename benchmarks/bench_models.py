"""What the benchmarks run: one frozen model, and copies of it with each kind of adapter on the same base weights."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.inplace_training import inplace_training
from sbora_diffusion.adapters.layer import attach
from sbora_diffusion.methods.live import only_passed, unet_blocks_before

WAYS: tuple[str, ...] = ("base", "peft", "fa", "fa direct", "fb", "fb direct")
UPWARD = "fa direct, up_blocks"  # of a U-Net, as `train --set blocks=up_blocks` does it
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CONTEXT = 768  # what SD1.5's cross-attention reads


def adapted(base: nn.Module, way: str, rank: int, targets: Sequence[str], stack: ExitStack, count: int = 1) -> Any:
    """A copy on the same base parameters, with `count` adapters of random weights, all of them active.

    Args:
        way: "base" for none, "peft" for PEFT's LoRA, or SBoRA: "fa", "fb", also "… direct" until the stack is closed;
            and UPWARD.
    """
    way, _, block = way.partition(", ")
    if block:
        targets = [name for name, _ in base.named_modules() if name.startswith(block) and name.endswith(tuple(targets))]
    model: Any = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    if way == "base":
        return model
    names = [f"concept_{number}" for number in range(count)]
    for number, name in enumerate(names):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        model = inject_adapter_in_model(config, model, name)
        if way != "peft":
            attach(model, name, "fa" if way.startswith("fa") else "fb", Interval(rank * number, rank), 0)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(std=0.01)
    if way.endswith("direct"):
        assert stack.enter_context(inplace_training(model, names[0]))
    if block:
        stack.enter_context(only_passed(model, unet_blocks_before(model, targets)))
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class AttentionStack(nn.Module):
    """The linear layers of SD1.5's 32 attentions, on as many tokens as there, without the attention in between.

    Queries, keys and values of a self-attention have one input, keys and values of a cross-attention the text.

    Args:
        blocks: (width, tokens, number of transformer blocks).
    """

    def __init__(self, blocks: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.sizes = [(width, tokens) for width, tokens, count in blocks for _ in range(count)]
        self.attentions = nn.ModuleList(
            _attention(width, context) for width, _ in self.sizes for context in (width, CONTEXT)
        )
        self.requires_grad_(False)

    def inputs(self) -> list[Tensor]:
        """What the blocks read, (1, tokens, width) each, and the text (1, 77, 768); all want a gradient."""
        sizes = [(1, tokens, width) for width, tokens in self.sizes] + [(1, 77, CONTEXT)]
        return [torch.randn(size, device=next(self.parameters()).device, requires_grad=True) for size in sizes]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        *hidden, text = inputs
        return [self._block(number, x, text) for number, x in enumerate(hidden)]

    def _block(self, number: int, x: Tensor, text: Tensor) -> Tensor:
        for attention, context in zip(self.attentions[2 * number : 2 * number + 2], (None, text), strict=True):
            layers: Any = attention
            read = x if context is None else context
            mixed = layers["to_q"](x) + (layers["to_k"](read) + layers["to_v"](read)).mean(1, keepdim=True)
            x = x + layers["to_out"][0](mixed)
        return x


SD15_BLOCKS = ((320, 4096, 5), (640, 1024, 5), (1280, 256, 5), (1280, 64, 1))  # a latent of 64 × 64


def _attention(width: int, context: int) -> nn.ModuleDict:
    inputs = {"to_q": width, "to_k": context, "to_v": context}
    layers: dict[str, nn.Module] = {name: nn.Linear(size, width, bias=False) for name, size in inputs.items()}
    return nn.ModuleDict({**layers, "to_out": nn.ModuleList([nn.Linear(width, width)])})


def sd15_unet(tiny: bool = False) -> Any:
    """A U-Net with the configuration of Stable Diffusion 1.5 and random weights, frozen; or a toy of its kind."""
    widths = (32, 64) if tiny else (320, 640, 1280, 1280)
    attending = len(widths) - 1
    unet = UNet2DConditionModel(
        sample_size=64,
        layers_per_block=1 if tiny else 2,
        block_out_channels=widths,
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
    )
    return unet.requires_grad_(False)


def sdxl_unet() -> Any:
    """A U-Net with the configuration of Stable Diffusion XL and random weights, frozen."""
    unet = UNet2DConditionModel(
        sample_size=128,
        layers_per_block=2,
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),  # pyright: ignore[reportArgumentType]  # the annotation is too narrow
        transformer_layers_per_block=(1, 2, 10),  # pyright: ignore[reportArgumentType]  # the same
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return unet.requires_grad_(False)


def conditions(model: Any, batch: int, device: torch.device) -> dict[str, Any]:
    """What SDXL wants besides: the pooled text, and the image's size and crop."""
    if getattr(model.config, "addition_embed_type", None) != "text_time":
        return {}
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * batch, device=device)
    return {"added_cond_kwargs": {"text_embeds": torch.randn(batch, 1280, device=device), "time_ids": sizes}}


def unet_inputs(size: int, batch: int, device: torch.device, width: int = CONTEXT) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and text; latents and text want a gradient, as in a training that learns a token."""
    return (
        torch.randn(batch, 4, size, size, device=device, requires_grad=True),
        torch.full((batch,), 500, device=device),
        torch.randn(batch, 77, width, device=device, requires_grad=True),
    )
