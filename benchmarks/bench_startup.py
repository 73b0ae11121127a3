"""(f) Start-up of the program and its parts, each in a fresh process, and files: load, save, write, against diffusers.

    python benchmarks/bench_startup.py [--device cpu] [--rounds 5] [--tiny] [--out FILE]

"Collecting less" is how every command imports: with fewer garbage collections (`console.collect_garbage_less`).
Files are of one concept of rank 8 for emoji64 (random numbers): ours, and the same as a LoRA, as diffusers reads and
writes it through PEFT. Ours is written into the loaded model's weights, theirs
attached to its layers; both are taken out again.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

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
from safetensors.torch import load_file, save_file

from sbora_diffusion.adapters.basis import Interval, Spec, indices
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.interchange.exporting import LORA_NAME, export
from sbora_diffusion.models.base import Base, load_base

RANK = 8
COLLECTING_LESS = """
from sbora_diffusion.cli.console import collect_garbage_less
collect_garbage_less()
import sbora_diffusion.cli.train
"""
STARTS = {
    "python": ["-c", ""],
    "sbora-diffusion --help": ["-m", "sbora_diffusion", "--help"],
    "import torch": ["-c", "import torch"],
    "import peft": ["-c", "import peft"],
    "import the adapter core": ["-c", "import sbora_diffusion.adapters.layer"],
    "import the train command": ["-c", "import sbora_diffusion.cli.train"],
    "the same, collecting less": ["-c", COLLECTING_LESS],
    "load emoji64": ["-c", "from sbora_diffusion.models.base import load_base; load_base('emoji64')"],
}

app = new_app()


@app.command()
def main(device: Device = "cpu", rounds: Rounds = 5, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    target = prepare(device)
    starts = ("python", "sbora-diffusion --help") if tiny else tuple(STARTS)
    rows = start_up(starts, rounds)
    rows += files(load_base("emoji64"), rounds, target)
    save("startup", target, rows, out, rounds=rounds, tiny=tiny)


def start_up(starts: tuple[str, ...], rounds: int) -> list[Row]:
    """CPU time of whole processes, in turns."""
    times: dict[str, list[float]] = {start: [] for start in starts}
    for _ in range(rounds):
        for start in starts:
            before = _children_seconds()
            subprocess.run([sys.executable, *STARTS[start]], check=True, capture_output=True)
            times[start].append(_children_seconds() - before)
    return compared(times, what="start")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def files(base: Base, rounds: int, device: torch.device) -> list[Row]:
    """Into the model and out of it again, from a file, and the writing of the file: ours, and diffusers' with PEFT."""
    adapter, pipeline = random_adapter(base), base.pipeline
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, lora = folder / "ours.safetensors", folder / LORA_NAME
        adapter.save(ours)
        export(adapter, base.layer_shapes, "diffusers", folder, resolution=base.resolution, date="2026-01-01")

        def load_and_unload() -> None:
            pipeline.load_lora_weights(str(folder), weight_name=LORA_NAME)
            pipeline.unload_lora_weights()

        def write_and_restore() -> None:
            with applied(base, [Adapter.load(ours)]):
                pass

        inout = take_turns({"peft": load_and_unload, "ours": write_and_restore}, rounds, device)
        reading = take_turns({"ours": lambda: Adapter.load(ours)}, rounds, device)
        tensors = load_file(lora)
        saving = {"peft": lambda: save_file(tensors, lora), "ours": lambda: adapter.save(ours, force=True)}
        rows = compared(inout, what="load into the model, take out")
        rows += compared(reading, what="read and check the file")
        rows += compared(take_turns(saving, rounds, device), what="save the file")
        sizes = {"peft": lora.stat().st_size, "ours": ours.stat().st_size}
    return [row | {"bytes": sizes[row["way"]]} for row in rows]


def random_adapter(base: Base, name: str = "dog", start: int = 0) -> Adapter:
    """A concept in every adapted layer, with an embedding for its token."""
    spec = Spec(
        name=name,
        side="fa",
        rank=RANK,
        intervals=(Interval(start, RANK),),
        seed=0,
        base_id=base.id,
        base_fingerprint=base.fingerprint,
        tokens={f"<{name}>": "dog"},
    )
    factors = {
        key: Factor(indices(key.split(".", 1)[1], shape[1], spec.intervals[0], 0), 0.01 * torch.randn(shape[0], RANK))
        for key, shape in base.layer_shapes.items()
    }
    width = base.pipeline.text_encoder.config.hidden_size
    return Adapter(spec, factors, {f"text_encoder.<{name}>": torch.randn(1, width)})


if __name__ == "__main__":
    app()
