"""(a) One linear layer, forward and backward, in the shapes of SD1.5, SDXL and LLaMA: SBoRA, PEFT's LoRA, frozen.

    python benchmarks/bench_layers.py [--device cpu] [--rounds 15] [--tiny] [--out FILE]

The base way is the frozen layer alone: its output, and the gradient of its input.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
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
from bench_models import WAYS, adapted
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

SHAPES = {  # in, out, tokens
    "SD1.5 320 self": (320, 320, 4096),
    "SD1.5 640 self": (640, 640, 1024),
    "SD1.5 1280 self": (1280, 1280, 256),
    "SD1.5 320 text": (768, 320, 77),
    "SD1.5 1280 text": (768, 1280, 77),
    "SDXL 640 self": (640, 640, 4096),
    "SDXL 1280 self": (1280, 1280, 1024),
    "SDXL 1280 text": (2048, 1280, 77),
    "LLaMA 7B attention": (4096, 4096, 256),
    "LLaMA 7B up": (4096, 11008, 256),
}
RANKS = (8, 32)
HALF = ("SD1.5 320 self", "SD1.5 320 text")  # a CPU without bf16 arithmetic takes 36 s for one LLaMA layer backward
QUANTISED = ("SD1.5 1280 self", "LLaMA 7B attention")

app = new_app()


@app.command()
def main(device: Device = "cpu", rounds: Rounds = 15, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    target = prepare(device)
    cases = [(shape, "fp32") for shape in SHAPES]
    cases += [(shape, "bf16") for shape in (HALF if target.type == "cpu" else SHAPES)]
    cases += [(shape, "nf4") for shape in QUANTISED]
    rows = []
    for shape, kind in cases[-4:] if tiny else cases:
        for rank in RANKS:
            size = (64, 64, 16) if tiny else SHAPES[shape]
            turns = rounds if kind == "fp32" or target.type == "cuda" else max(1, rounds // 3)
            rows += measure(shape, size, kind, rank, turns, target)
    save("layers", target, rows, out, rounds=rounds, tiny=tiny)


def measure(
    shape: str, size: tuple[int, int, int], kind: str, rank: int, rounds: int, device: torch.device
) -> list[Row]:
    """Every way in turns, on one layer."""
    inputs, outputs, tokens = size
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    base = nn.Sequential(_linear(inputs, outputs, kind, dtype)).requires_grad_(False).to(device)
    x = torch.randn(1, tokens, inputs, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn(1, tokens, outputs, dtype=dtype, device=device)
    with ExitStack() as stack:
        ways = {
            way: _step(adapted(base, way, rank, ["0"], stack).to(device, dtype), x, upstream)
            for way in WAYS
            if not (kind == "nf4" and way.endswith("direct"))
        }
        times = take_turns(ways, rounds, device)
    return compared(times, layer=shape, size=f"{inputs}×{outputs}, {tokens} tokens", weights=kind, rank=rank)


def _linear(inputs: int, outputs: int, kind: str, dtype: torch.dtype) -> nn.Module:
    if kind != "nf4":
        return nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    layer: Any = Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.support_avx512bf16_for_cpu = False
    return layer


def _step(model: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(upstream)

    return run


if __name__ == "__main__":
    app()
