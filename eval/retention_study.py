"""What the retention study compares: concepts, ways to choose columns, ways to merge, and the cells' files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.utils.files import write_file

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
    """What is compared, with which base model and judge, and in which files."""

    folder: Path  # of trainings and grids: large, not to be committed
    results: Path = Path("eval/results/retention")  # of scores, a file for each (scheme, seed): committed
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
        """Return the results of a (scheme, seed) so far."""
        return Found(self.results / f"{scheme}-{seed}.json")

    def missing(self, scheme: str, seed: int) -> list[Cell]:
        """Return the missing cells of a (scheme, seed)."""
        found = self.found(scheme, seed)
        return [cell for cell in planned(self) if any(not found.scores(cell[0], cell[1], name) for name in cell[2])]

    def groups(self, size: int) -> list[tuple[str, ...]]:
        """Return groups of neighbours, so that every concept is in one merge of each size."""
        return [self.concepts[start : start + size] for start in range(0, len(self.concepts), size)]


def columns_of(scheme: str, seed: int, number: int) -> tuple[Interval, int]:
    """Return interval and basis seed of a concept: its own columns, random ones, or those that all share."""
    if scheme == "disjoint":
        return Interval(number * RANK, RANK), 0
    return Interval(0, RANK), 0 if scheme == "shared" else 1000 * (seed + 1) + number


def planned(study: Study) -> Iterator[Cell]:
    """Yield every single concept, then every merge."""
    yield from (("single", 1, (name,)) for name in study.concepts)
    yield from ((how, size, names) for size in study.sizes for how in study.hows for names in study.groups(size))


class Found:
    """Scores and merges of one (scheme, seed): a JSON file that grows, complete at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict = json.loads(path.read_bytes()) if path.exists() else {"scores": {}, "merges": {}}

    def scores(self, how: str, size: int, name: str) -> dict[str, list[float]]:
        """Return metric -> one score for each prompt, of one concept's images; empty if missing."""
        return self._found["scores"].get(f"{how}-{size}-{name}", {})

    def merged(self, how: str, names: tuple[str, ...]) -> dict[str, float]:
        """Return time and objective of a merge; empty if missing."""
        return self._found["merges"].get(f"{how}-{'+'.join(names)}", {})

    def add(self, cell: Cell, scores: Mapping[str, Mapping[str, list[float]]], merged: Mapping[str, float]) -> None:
        """Add the results of a cell: scores by concept, and time and objective if it is a merge."""
        how, size, names = cell
        self._found["scores"] |= {f"{how}-{size}-{name}": scores[name] for name in names}
        if merged:
            self._found["merges"][f"{how}-{'+'.join(names)}"] = merged
        write_file(self._path, (json.dumps(self._found) + "\n").encode(), overwrite=True)
