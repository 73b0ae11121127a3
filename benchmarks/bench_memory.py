"""(c) What a training step keeps: the activations saved for the backward pass, and the peak of the process's memory.

    python benchmarks/bench_memory.py [--device cpu] [--no-peaks] [--tiny] [--out FILE]

Saved activations of a U-Net of SD1.5's shape at its full latent of 64 × 64, counted on the meta device, where nothing
is computed: every storage that autograd saves, once, but for the parameters. The peak is of two training steps in a
process of its own: resident memory on a CPU (latent 32 × 32), what torch allocated on a GPU (64 × 64).
"""

import resource
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Any

import torch
import typer
from bench_common import Device, Out, Row, Tiny, new_app, prepare, save
from bench_models import TARGETS, UPWARD, WAYS, adapted, sd15_unet, unet_inputs
from torch import Tensor

RANKS, PEAK_RANK = (8, 32), 8
ALL_WAYS = (*WAYS, UPWARD)
MIB = 2**20

app = new_app()


@app.command()
def main(
    device: Device = "cpu",
    peaks: Annotated[bool, typer.Option("--peaks/--no-peaks", help="Also the peaks: minutes on a CPU.")] = True,
    tiny: Tiny = False,
    out: Out = None,
) -> None:
    """Measure, and save the numbers."""
    target = prepare(device)
    ranks = (PEAK_RANK,) if tiny else RANKS
    saved = {(rank, way): saved_activations(way, rank, tiny) for rank in ranks for way in ALL_WAYS}
    highest = peaks_of_all(device, tiny) if peaks else {}
    save("memory", target, [_row(rank, way, saved, highest) for rank, way in saved], out, tiny=tiny)


def peaks_of_all(device: str, tiny: bool) -> dict[str, int]:
    """Each way's in a fresh process; of toys, where it says nothing, in this one."""
    measure = partial(peak_memory, rank=PEAK_RANK, device=device, tiny=tiny)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        return dict(zip(ALL_WAYS, (map if tiny else fresh.map)(measure, ALL_WAYS), strict=True))


def saved_activations(way: str, rank: int, tiny: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, the parameters left out."""
    with torch.device("meta"), ExitStack() as stack:
        model = adapted(sd15_unet(tiny), way, rank, TARGETS, stack).train()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(*unet_inputs(8 if tiny else 64, 1, torch.device("meta")))
        del output
    return sum(storage.nbytes() for storage in kept.values())


def peak_memory(way: str, rank: int, device: str, tiny: bool) -> int:
    """Bytes at the peak of two training steps; to be called in a fresh process."""
    target = prepare(device)
    model: Any = sd15_unet(tiny).to(target)
    size = 8 if tiny else 32 if target.type == "cpu" else 64
    with ExitStack() as stack:
        model = adapted(model, way, rank, TARGETS, stack).train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters or [torch.zeros(1, requires_grad=True)])
        for _ in range(2):
            optimizer.zero_grad()
            model(*unet_inputs(size, 1, target)).sample.sum().backward()
            optimizer.step()
    if target.type == "cuda":
        return torch.cuda.max_memory_allocated(target)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _row(rank: int, way: str, saved: dict[tuple[int, str], int], peaks: dict[str, int]) -> Row:
    row: Row = {"rank": rank, "way": way, "saved MiB": round(saved[rank, way] / MIB, 1)}
    row["saved over base MiB"] = round((saved[rank, way] - saved[rank, "base"]) / MIB, 1)
    if rank == PEAK_RANK and peaks:
        row |= {"peak MiB": round(peaks[way] / MIB), "peak over base MiB": round((peaks[way] - peaks["base"]) / MIB)}
    return row


if __name__ == "__main__":
    app()
