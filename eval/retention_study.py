"""What the retention study compares: concepts, ways to choose columns, ways to merge, and where each cell lies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbora_diffusion.adapter.basis import Interval

CONCEPTS = ("dog", "penguin", "octopus", "cat", "horse", "rooster")
CONCEPTS += ("dragon", "monkey", "elephant", "tiger", "snail", "pumpkin")
SCHEMES = ("disjoint", "random", "shared")
HOWS = ("sum", "fuse", "full", "lbfgs")
SIZES = (3, 6, 12)
RANK = 8


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, on which base and by which judge, and where its files lie."""

    folder: Path
    base: str = "emoji64"
    judge: str = "emoji-clip"
    suite: str = "emoji64"
    concepts: tuple[str, ...] = CONCEPTS
    sizes: tuple[int, ...] = SIZES
    overrides: Mapping[str, str] | None = None  # of the recipe

    def adapter_path(self, scheme: str, seed: int, name: str) -> Path:
        return self.folder / "adapters" / f"{scheme}-{seed}" / f"{name}.safetensors"

    def cell_path(self, scheme: str, seed: int, how: str, size: int, name: str) -> Path:
        """Scores of one concept's pictures; `how` is "single" for size 1."""
        return self.folder / "scores" / f"{scheme}-{seed}" / f"{how}-{size}-{name}.json"

    def merge_path(self, scheme: str, seed: int, how: str, names: Sequence[str]) -> Path:
        """Times and objective of one merge."""
        return self.folder / "merges" / f"{scheme}-{seed}" / f"{how}-{'+'.join(names)}.json"

    def groups(self, size: int) -> list[tuple[str, ...]]:
        """Neighbours, so that every concept is in one merge of each size."""
        return [self.concepts[start : start + size] for start in range(0, len(self.concepts), size)]


def columns_of(scheme: str, seed: int, number: int) -> tuple[Interval, int]:
    """The interval and the basis seed of a concept: its own columns, columns by chance, or everybody's."""
    if scheme == "disjoint":
        return Interval(number * RANK, RANK), 0
    return Interval(0, RANK), 0 if scheme == "shared" else 1000 * (seed + 1) + number


def planned(study: Study) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """(how, size, names): every concept alone, then every merge."""
    yield from (("single", 1, (name,)) for name in study.concepts)
    yield from ((how, size, names) for size in study.sizes for how in HOWS for names in study.groups(size))
