"""(k) On a GPU, at real size: time and peak memory of a training step of SD1.5 (512²) and SDXL (1024²).

    python benchmarks/bench_gpu.py [--device cuda] [--rounds 7] [--tiny] [--out FILE]

U-Nets of those shapes with random weights; a step is forward, backward and AdamW on a rank-8 adapter of all attention
layers, whose weights are fp32. The base way is the frozen model: forward, and backward to the inputs only. Arithmetic
in fp32, in bf16 by autocast with the frozen weights in fp32, and with these in bf16, too. The peak is what torch has
allocated at most during the way's own steps, the frozen weights included. Where four images take no longer than one,
the GPU waits for Python, and a ratio compares how much of that each way runs.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from bench_common import Device, Out, Rounds, Row, Tiny, compared, new_app, prepare, save, take_turns
from bench_models import TARGETS, adapted, conditions, sd15_unet, sdxl_unet, trained, unet_inputs

RANK = 8
WAYS = ("base", "peft", "fa", "fa direct", "fb direct")
CASES = (  # model, latent side, batch, arithmetic
    ("SD1.5, 512²", 64, 1, "fp32"),
    ("SD1.5, 512²", 64, 4, "bf16, weights fp32"),
    ("SD1.5, 512²", 64, 4, "bf16, weights bf16"),
    ("SDXL, 1024²", 128, 1, "bf16, weights fp32"),
    ("SDXL, 1024²", 128, 1, "bf16, weights bf16"),
    ("SDXL, 1024²", 128, 4, "bf16, weights bf16"),
)

app = new_app()


@app.command()
def main(device: Device = "cuda", rounds: Rounds = 7, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    target, rows = prepare(device), []
    for name, size, batch, arithmetic in CASES[1:2] if tiny else CASES:
        rows += measure(name, 8 if tiny else size, batch, arithmetic, rounds, target, tiny)
    save("gpu", target, rows, out, rounds=rounds, tiny=tiny)


def measure(
    name: str, size: int, batch: int, arithmetic: str, rounds: int, device: torch.device, tiny: bool
) -> list[Row]:
    """Every way in turns, on one model."""
    with device:
        base = sd15_unet(tiny) if name.startswith("SD1.5") else sdxl_unet()
    if arithmetic.endswith("weights bf16"):
        base.to(torch.bfloat16)
    inputs = unet_inputs(size, batch, device, base.config.cross_attention_dim)
    more, half = conditions(base, batch, device), arithmetic.startswith("bf16")
    with ExitStack() as stack:
        steps = {way: _step(_adapted(base, way, stack), inputs, more, half) for way in WAYS}
        times = take_turns(steps, rounds, device)
        peaks = {way: _peak(step, device) for way, step in steps.items()}
    rows = compared(times, model=name, batch=batch, arithmetic=arithmetic)
    for row in rows:
        row |= {"images/s": round(1e3 * batch / row["ms"], 2), "peak MiB": peaks[row["way"]]}
        row["over base MiB"] = peaks[row["way"]] - peaks["base"]
    return rows


def _adapted(base: Any, way: str, stack: ExitStack) -> Any:
    """Its adapter in fp32, whatever the frozen weights are."""
    model = adapted(base, way, RANK, TARGETS, stack)
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    return model


def _step(model: Any, inputs: tuple[Any, ...], more: dict[str, Any], half: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(trained(model) or [torch.zeros(1, requires_grad=True)], lr=1e-4)

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        optimizer.zero_grad()
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=half):
            answered = model(*inputs, **more).sample
        answered.float().pow(2).mean().backward()
        optimizer.step()

    return run


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """MiB; 0 on a CPU, which does not tell."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        step()
    return round(torch.cuda.max_memory_allocated(device) / 2**20)


if __name__ == "__main__":
    app()
