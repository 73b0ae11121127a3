"""Concept files and reservations for the tests of the library."""

import multiprocessing

import torch

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.file import Adapter, Factor, Spec
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.library.library import Library

FORK = multiprocessing.get_context("fork")


def save_adapter(
    library: Library, name: str, interval: str, side: Side = "fa", base: str = "f00d", parents: tuple[str, ...] = ()
) -> None:
    intervals = tuple(Interval.parse(part) for part in interval.split(",") if part)
    rank = sum(interval.rank for interval in intervals) or 1
    spec = Spec(
        side=side, rank=rank, intervals=intervals, seed=0, base_id="toy", base_fingerprint=base,
        tokens={f"<{name}>": "thing"}, name=name, parents=parents,
    )  # fmt: skip
    weight = torch.ones((5, rank) if side == "fa" else (rank, 5))
    factors = {"unet.layer": Factor(torch.arange(rank), weight)}
    Adapter(spec, factors, {f"text_encoder.<{name}>": torch.ones(1, 4)}).save(library.path(name))


def space(width: int = 64, seed: int = 0) -> Space:
    widths = {"unet.narrow": width, "unet.wide": 2 * width}
    return Space(base_id="toy", base_fingerprint="f00d", side="fa", seed=seed, widths=widths)


def reserve(
    library: Library, name: str, rank: int = 8, width: int = 64, pinned: str | None = None, lasting: bool = False
) -> str:
    interval = Interval.parse(pinned) if pinned else None
    return str(library.reserve(space(width), rank, name, interval, lasting=lasting))
