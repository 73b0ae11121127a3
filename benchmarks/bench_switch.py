"""(d) Taking a concept out and putting another in, in SD1.5's attention layers: SBoRA against PEFT.

    python benchmarks/bench_switch.py [--device cpu] [--rounds 9] [--tiny] [--out FILE]

Rank 8, fp32, random weights in the shapes of Stable Diffusion 1.5's 128 attention layers (94 million entries). PEFT can
keep concepts live, and switch by `set_adapter`, or merge them into the weights, and switch by `unmerge` and `merge`;
SBoRA can do both in PEFT, too, and without it
writes and restores columns or rows. After all turns the base weights of what was written
are compared bit for bit with what they were.
"""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import torch
from bench_common import Device, Out, Rounds, Tiny, compared, new_app, prepare, save, take_turns
from bench_models import SD15_BLOCKS, TARGETS, AttentionStack, adapted
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sbora_diffusion.adapters.basis import Interval, Side, indices
from sbora_diffusion.adapters.file import Factor
from sbora_diffusion.adapters.weight_patcher import WeightPatcher

RANK = 8
CONCEPTS = ("concept_0", "concept_1")

app = new_app()


@app.command()
def main(device: Device = "cpu", rounds: Rounds = 9, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    target = prepare(device)
    sizes = ((32, 16, 1),) if tiny else SD15_BLOCKS
    with ExitStack() as stack:
        models = {
            way: adapted(AttentionStack(sizes).to(target), way, RANK, TARGETS, stack, 2) for way in ("peft", "fa")
        }
        written = {side: AttentionStack(sizes).to(target) for side in ("fa", "fb")}
        before = {side: [weight.clone() for weight in model.parameters()] for side, model in written.items()}
        ways: dict[str, Callable[[], None]] = {
            "peft": _merged(models["peft"]),
            "peft, set_adapter": _live(models["peft"]),
            "fa, set_adapter": _live(models["fa"]),
            "fa, merge": _merged(models["fa"]),
            "fa, written": _written(written["fa"], "fa"),
            "fb, written": _written(written["fb"], "fb"),
        }
        times = take_turns(ways, rounds, target)
    for side, model in written.items():
        assert all(map(torch.equal, before[side], model.parameters()))
    layers = sum(isinstance(module, nn.Linear) for module in written["fa"].modules())
    rows = [row | {"times faster": round(1 / row["of peft"], 1)} for row in compared(times, layers=layers, rank=RANK)]
    save("switch", target, rows, out, rounds=rounds, tiny=tiny)


def _tuners(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _live(model: nn.Module) -> Callable[[], None]:
    """Activate the one concept, then the other, turn by turn."""
    tuners, names = _tuners(model), cycle(CONCEPTS)

    def run() -> None:
        name = next(names)
        for tuner in tuners:
            tuner.set_adapter(name, inference_mode=True)

    return run


def _merged(model: nn.Module) -> Callable[[], None]:
    """Merge one concept into the weights and take it out again: one merge and one unmerge, as in a switch."""
    tuners, names = _tuners(model), cycle(CONCEPTS)

    def run() -> None:
        name = next(names)
        for tuner in tuners:
            tuner.merge(adapter_names=[name])
        for tuner in tuners:
            tuner.unmerge()

    return run


def _written(model: nn.Module, side: Side) -> Callable[[], None]:
    """The same with SBoRA's own."""
    weights, names = WeightPatcher(model), cycle(CONCEPTS)
    factors = {name: random_factors(model, side, number) for number, name in enumerate(CONCEPTS)}

    def run() -> None:
        name = next(names)
        weights.write(name, factors[name], side)
        weights.restore(name)

    return run


def random_factors(model: nn.Module, side: Side, number: int) -> dict[str, Factor]:
    """An adapter for every attention layer, at the interval with this number; on the model's device, as PEFT's are."""
    factors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(TARGETS):
            dim = layer.in_features if side == "fa" else layer.out_features
            size = (layer.out_features, RANK) if side == "fa" else (RANK, layer.in_features)
            index = indices(name, dim, Interval(RANK * number, RANK), 0)
            weight = 0.01 * torch.randn(size, device="cpu")
            factors[name] = Factor(index.to(layer.weight.device), weight.to(layer.weight.device))
    return factors


if __name__ == "__main__":
    app()
