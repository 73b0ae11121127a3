"""Tiny models of every family that adapters live in: built in code, saved, and loaded by the real from_pretrained."""

from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.layer import SboraLayer, attach
from sbora_diffusion.adapters.peft_layer import FastForward

Kind = Literal["unet", "clip", "llama", "llama-nf4"]
NAMES = ("dog", "cat", "fox")  # of adapters; PEFT mistakes a number for a part of a module name
KINDS: tuple[Kind, ...] = get_args(Kind)
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "clip": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "llama": LLAMA,
    "llama-nf4": LLAMA,
}
DEPTH: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}  # of the text models

each_kind = pytest.mark.parametrize("kind", KINDS)
each_side = pytest.mark.parametrize("side", ["fa", "fb"])


class Tiny:
    """A folder of saved tiny models."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        _unet().save_pretrained(folder / "unet")
        _clip().save_pretrained(folder / "clip")
        _llama().save_pretrained(folder / "llama")
        self.folder = folder

    def load(self, kind: Kind) -> Any:
        """A fresh copy in evaluation mode, float32 but for the nf4 weights."""
        if kind == "unet":
            return UNet2DConditionModel.from_pretrained(self.folder / "unet").eval()
        if kind == "clip":
            return CLIPTextModel.from_pretrained(self.folder / "clip").eval()
        if kind == "llama":
            return LlamaForCausalLM.from_pretrained(self.folder / "llama").eval()
        return LlamaForCausalLM.from_pretrained(
            self.folder / "llama",
            device_map="cpu",
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
        ).eval()


def inject(kind: Kind, model: Any, adapter: str, rank: int = 4, alpha: int = 8, **options: Any) -> Any:
    """Put a LoRA adapter into a model in the way that its library does; returns the model, wrapped or not."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[kind], **options)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
    elif kind.startswith("llama"):
        model = get_peft_model(model, config, adapter_name=adapter)
    else:
        model.add_adapter(config, adapter)
    return model.eval()


def activate(model: Any, *adapters: str) -> None:
    """Make adapters active, all of them at once."""
    tuner: Any = model.base_model if isinstance(model, PeftModel) else model
    tuner.set_adapter(list(adapters))


def run(kind: Kind, model: Any, seed: int = 0) -> Tensor:
    """The model's output for two random inputs."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "unet":
        x = torch.randn(2, 4, 8, 8, generator=generator).to(model.dtype)
        text = torch.randn(2, 3, 32, generator=generator).to(model.dtype)
        return model(x, torch.tensor([10, 500]), text).sample
    ids = torch.randint(0, 96, (2, 7), generator=generator)
    return model(ids).last_hidden_state if kind == "clip" else model(ids).logits


def perturb(parameters: Any, seed: int = 1, std: float = 0.05) -> None:
    """Stand-in for training: random numbers instead of zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def attached(
    tiny: Tiny, kind: Kind, *sides: Side, trained: bool = True, **options: Any
) -> tuple[Any, list[dict[str, SboraLayer]]]:
    """A model with adapters dog, cat, fox of the given sides at consecutive intervals, all active."""
    model, adapters = tiny.load(kind), []
    for number, (name, side) in enumerate(zip(NAMES, sides, strict=False)):
        model = inject(kind, model, name, **options)
        adapters.append(attach(model, name, side, Interval(4 * number, 4), seed=0))
    activate(model, *NAMES[: len(sides)])
    if trained:
        for number, layers in enumerate(adapters):
            perturb((layer.trained for layer in layers.values()), seed=number)
    return model, adapters


def plain_copy(tiny: Tiny, kind: Kind, model: Any, *names: str) -> Any:
    """The same adapters in plain PEFT, which multiplies by the one-hot factor."""
    plain = tiny.load(kind)
    for name in names:
        plain = inject(kind, plain, name)
    activate(plain, *names)
    for module in plain.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(model.get_parameter(name))
    assert not any(isinstance(module, FastForward) for module in plain.modules())
    return plain


def lora(layer: SboraLayer, frozen: bool) -> Tensor:
    """The one-hot factor of a layer, or the trained one."""
    factor = (layer.module.lora_A if (layer.side == "fa") == frozen else layer.module.lora_B)[layer.adapter]
    assert isinstance(factor, nn.Linear)
    return factor.weight


def dense_delta(layer: SboraLayer) -> Tensor:
    """ΔW (out, in) in float64, by multiplying both factors."""
    a, b = layer.module.lora_A[layer.adapter], layer.module.lora_B[layer.adapter]
    assert isinstance(a, nn.Linear)
    assert isinstance(b, nn.Linear)
    return b.weight.detach().double() @ a.weight.detach().double() * layer.scaling


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        **DEPTH,
        vocab_size=100,
        hidden_size=32,
        intermediate_size=37,
        max_position_embeddings=16,
        bos_token_id=98,
        eos_token_id=99,
    )
    return CLIPTextModel(config)


def _llama() -> LlamaForCausalLM:
    config = LlamaConfig(**DEPTH, vocab_size=96, hidden_size=64, intermediate_size=128, num_key_value_heads=2)
    return LlamaForCausalLM(config)
