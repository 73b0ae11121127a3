"""(e) A denoising step with 1, 4 and 12 concepts of rank 8: live, written into the weights, and as PEFT's LoRAs.

    python benchmarks/bench_generation.py [--device cpu] [--rounds 9] [--no-unet] [--tiny] [--out FILE]

One call of the U-Net without gradients, batch of two as for guidance: emoji64's own U-Net, and one of SD1.5's shape
with random weights, on a CPU with a latent of 32 × 32 instead of 64 × 64.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import torch
import typer
from bench_common import (
    Device,
    Out,
    Rounds,
    Row,
    Tiny,
    compared,
    new_app,
    prepare,
    save,
    take_turns,
)
from bench_models import TARGETS, adapted, sd15_unet
from bench_switch import RANK, random_factors
from torch import Tensor

from sbora_diffusion.adapters.weight_patcher import WeightPatcher
from sbora_diffusion.models.base import load_base

app = new_app()


@app.command()
def main(
    device: Device = "cpu",
    rounds: Rounds = 9,
    unet: Annotated[bool, typer.Option("--unet/--no-unet", help="Also SD1.5's U-Net: minutes on a CPU.")] = True,
    tiny: Tiny = False,
    out: Out = None,
) -> None:
    """Measure, and save the numbers."""
    target = prepare(device)
    counts = (2,) if tiny else (1, 4, 12)
    rows = measure(load_base("emoji64").pipeline.unet, "emoji64", 16, 24, counts, rounds, target)
    size = 8 if tiny else 32 if target.type == "cpu" else 64
    name = f"SD1.5's U-Net, latent {size}×{size}"
    if unet:
        with target:
            model = sd15_unet(tiny)
        rows += measure(model, name, size, 77, counts, max(1, rounds // 2), target)
    save("generation", target, rows, out, rounds=rounds, tiny=tiny)


@torch.no_grad()
def measure(
    unet: Any, name: str, size: int, tokens: int, counts: Sequence[int], rounds: int, device: torch.device
) -> list[Row]:
    """All ways in turns on one U-Net, with a latent of size × size and a text of so many tokens."""
    unet.to(device).eval()
    noisy = torch.randn(2, unet.config.in_channels, size, size, device=device)
    text = torch.randn(2, tokens, unet.config.cross_attention_dim, device=device)
    inputs = (noisy, torch.tensor([500, 500], device=device), text)
    rows = []
    for count in counts:
        with ExitStack() as stack:
            models = {"base": unet, "fa, written": _written(unet, count)}
            for way, adapter in (("peft", "peft"), ("fa, live", "fa"), ("fb, live", "fb")):
                models[way] = adapted(unet, adapter, RANK, TARGETS, stack, count)
            times = take_turns({way: _call(model, inputs) for way, model in models.items()}, rounds, device)
        rows += compared(times, model=name, concepts=count)
    return rows


def _written(unet: Any, count: int) -> Any:
    """A copy with the concepts in its attention layers, and no weights of its own but theirs."""
    shared = (p for name, p in unet.named_parameters() if not name.removesuffix(".weight").endswith(TARGETS))
    model = copy.deepcopy(unet, memo={id(parameter): parameter for parameter in shared})
    weights = WeightPatcher(model)
    for number in range(count):
        weights.write(f"concept_{number}", random_factors(model, "fa", number), "fa")
    return model


def _call(model: Any, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    def run() -> None:
        model(*inputs)

    return run


if __name__ == "__main__":
    app()
