"""(b) A whole training step: the attention layers of SD1.5, a U-Net of its shape, and emoji64 as `train` does it.

    python benchmarks/bench_step.py [--device cpu] [--rounds 7] [--tiny] [--out FILE]

A step is forward, backward and AdamW, fused, on the adapter. The base way is the frozen model: forward, and backward
to the inputs only. The U-Net has random weights and, on a CPU, a latent of 32 × 32 instead of 64 × 64, for time.
"""

from collections.abc import Callable, Sequence
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
from bench_models import SD15_BLOCKS, TARGETS, UPWARD, WAYS, AttentionStack, adapted, sd15_unet, trained, unet_inputs
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import load_base
from sbora_diffusion.training.trainer import Trainer

RANKS = (8, 32)
EMOJI64: dict[str, tuple[str, dict[str, str]]] = {  # way -> method, and what differs from its recipe
    "base": ("textual-inversion", {}),
    "peft": ("lora", {}),
    "fa direct": ("sbora-fa", {"output_penalty": "0"}),
    "fb direct": ("sbora-fb", {"output_penalty": "0"}),
    "fa direct, quiet": ("sbora-fa", {}),
    "fa direct, all blocks": ("sbora-fa", {"output_penalty": "0", "blocks": ""}),
    "peft, up_blocks": ("lora", {"blocks": "up_blocks"}),
}
BATCHES = {"batch_size": "8", "prior_batch": "2"}  # the same for all
TINY = {"batch_size": "1", "prior_batch": "1", "crops": "1", "sampling_steps": "1", "prior_prompts": "a cat"}

app = new_app()


@app.command()
def main(device: Device = "cpu", rounds: Rounds = 7, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    target = prepare(device)
    rows = measure_emoji64(tiny, rounds, target)
    for rank in RANKS[:1] if tiny else RANKS:
        rows += measure_stack(((32, 16, 1),) if tiny else SD15_BLOCKS, rank, rounds, target)
    rows += measure_unet(tiny, RANKS[0], rounds, target)
    save("step", target, rows, out, rounds=rounds, tiny=tiny)


def measure_stack(blocks: Sequence[tuple[int, int, int]], rank: int, rounds: int, device: torch.device) -> list[Row]:
    """The linear layers of the attentions alone."""
    base = AttentionStack(blocks).to(device)
    inputs = base.inputs()
    return _measure(base, WAYS, inputs, rank, rounds, device, model="SD1.5's attention layers")


def measure_unet(tiny: bool, rank: int, rounds: int, device: torch.device) -> list[Row]:
    """The whole U-Net."""
    size = 8 if tiny else 32 if device.type == "cpu" else 64
    with device:
        base = sd15_unet(tiny)
    ways = (*(way for way in WAYS if not way.startswith("fb")), UPWARD)
    about = f"SD1.5's U-Net, latent {size}×{size}"
    return _measure(base, ways, unet_inputs(size, 1, device), rank, rounds, device, model=about)


def measure_emoji64(tiny: bool, rounds: int, device: torch.device) -> list[Row]:
    """`train`'s own steps with the methods' recipes, on the same data and batches; the base way learns the token only.

    SBoRA's recipe adapts the blocks going up, LoRA's all of them; the other way round are ways of their own. So is the
    closed form of loudness, which only SBoRA has.
    """
    concept, data, ways = load_concept("dog", default_roots()), None, {}
    with ExitStack() as stack:
        for way, (method, settings) in list(EMOJI64.items())[: 3 if tiny else None]:
            config = configure("emoji64", method, settings | (TINY if tiny else BATCHES))
            base = load_base("emoji64")
            assert base.layers  # looked up before PEFT wraps them
            data = data or prepare_data(concept, base, config)
            interval = Interval(0, config.method.rank) if way.startswith("f") else None
            live = stack.enter_context(injected_concept(concept, base, interval, config))
            ways[way] = _advance(Trainer(live, data, config, base))
        return compared(take_turns(ways, rounds, device), model="emoji64, `train`", rank=8)


def _advance(trainer: Trainer) -> Callable[[], None]:
    def step() -> None:
        trainer.train_step(trainer.step)

    return step


def _measure(
    base: nn.Module,
    ways: Sequence[str],
    inputs: Sequence[Tensor],
    rank: int,
    rounds: int,
    device: torch.device,
    **about: Any,
) -> list[Row]:
    with ExitStack() as stack:
        steps = {way: _step(adapted(base, way, rank, TARGETS, stack), inputs) for way in ways}
        times = take_turns(steps, rounds, device)
    return compared(times, **about, rank=rank)


def _step(model: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(trained(model) or [torch.zeros(1, requires_grad=True)], lr=1e-4, fused=True)

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        optimizer.zero_grad()
        output: Any = model(*inputs)
        outputs = output if isinstance(output, list) else [output.sample]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        optimizer.step()

    return run


if __name__ == "__main__":
    app()
