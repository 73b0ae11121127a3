"""What the retention study compares: concepts, ways to choose columns, ways to merge, and where each cell lies."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.utils.files import write_atomically

CONCEPTS = ("dog", "penguin", "octopus", "cat", "horse", "rooster")
CONCEPTS += ("dragon", "monkey", "elephant", "tiger", "snail", "pumpkin")
SCHEMES = ("disjoint", "random", "shared")
HOWS = ("sum", "fuse", "full", "lbfgs")  # "fuse:0.3" is the optimum of that prior weight, "fuse:loud" what `merge` does
SIZES = (3, 6, 12)
RANK = 8
# emoji64's when the study began
RECIPE = {"blocks": "", "output_penalty": "100", "token_learning_rate": "3e-2", "batch_size": "8", "prior_batch": "2"}


Cell = tuple[str, int, tuple[str, ...]]  # how ("single" for size 1), size, names


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, on which base and by which judge, and where its files lie."""

    folder: Path  # of trainings and sheets: large, not to be committed
    results: Path = Path("eval/results/retention")  # of what was found, a file for each (scheme, seed): committed
    base: str = "emoji64"
    judge: str = "emoji-clip"
    suite: str = "emoji64"
    concepts: tuple[str, ...] = CONCEPTS
    sizes: tuple[int, ...] = SIZES
    hows: tuple[str, ...] = HOWS
    sampling_steps: int = 10
    overrides: Mapping[str, str] | None = None  # of RECIPE

    def adapter_path(self, scheme: str, seed: int, name: str) -> Path:
        return self.folder / "adapters" / f"{scheme}-{seed}" / f"{name}.safetensors"

    def found(self, scheme: str, seed: int) -> "Found":
        """What is known of a (scheme, seed) so far."""
        return Found(self.results / f"{scheme}-{seed}.json")

    def missing(self, scheme: str, seed: int) -> list[Cell]:
        """Cells of a (scheme, seed) that are not there yet."""
        found = self.found(scheme, seed)
        return [cell for cell in planned(self) if any(not found.scores(cell[0], cell[1], name) for name in cell[2])]

    def groups(self, size: int) -> list[tuple[str, ...]]:
        """Neighbours, so that every concept is in one merge of each size."""
        return [self.concepts[start : start + size] for start in range(0, len(self.concepts), size)]


def columns_of(scheme: str, seed: int, number: int) -> tuple[Interval, int]:
    """The interval and the basis seed of a concept: its own columns, columns by chance, or everybody's."""
    if scheme == "disjoint":
        return Interval(number * RANK, RANK), 0
    return Interval(0, RANK), 0 if scheme == "shared" else 1000 * (seed + 1) + number


def planned(study: Study) -> Iterator[Cell]:
    """Every concept alone, then every merge."""
    yield from (("single", 1, (name,)) for name in study.concepts)
    yield from ((how, size, names) for size in study.sizes for how in study.hows for names in study.groups(size))


class Found:
    """Scores and merges of one (scheme, seed): a JSON file that grows, whole at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told: dict = json.loads(path.read_bytes()) if path.exists() else {"scores": {}, "merges": {}}

    def scores(self, how: str, size: int, name: str) -> dict[str, list[float]]:
        """Metric -> a number a prompt, of one concept's images; empty if not there."""
        return self._told["scores"].get(f"{how}-{size}-{name}", {})

    def merged(self, how: str, names: tuple[str, ...]) -> dict[str, float]:
        """Time and objective of a merge; empty if not there."""
        return self._told["merges"].get(f"{how}-{'+'.join(names)}", {})

    def add(self, cell: Cell, scores: Mapping[str, Mapping[str, list[float]]], merged: Mapping[str, float]) -> None:
        """What was found of a cell: scores by concept, and of the merge if it is one."""
        how, size, names = cell
        self._told["scores"] |= {f"{how}-{size}-{name}": scores[name] for name in names}
        if merged:
            self._told["merges"][f"{how}-{'+'.join(names)}"] = merged
        write_atomically(self._path, (json.dumps(self._told) + "\n").encode())
