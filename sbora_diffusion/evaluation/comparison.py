"""What a comparison of methods compares, the folder of its cells, and what these were judged by."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sbora_diffusion.data.concept import default_roots, known_concepts, load_concept
from sbora_diffusion.evaluation.suite import load_suite
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.loading import recipe_base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import image_digest
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: the same base, images, prompts and steps for every variant, or those of its own settings."""

    variants: tuple[str, ...]  # "lora" or "lora:rank=4,learning_rate=1e-3"; "sbora-fa:merge=fuse" merges in that way
    concepts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (1,)  # concepts merged at once
    base: str = "emoji64"
    suite: str = "emoji64"
    judge: str = "emoji-clip"
    settings: dict[str, str] = field(default_factory=dict)  # of all recipes
    digests: dict[str, str] = field(default_factory=dict)  # of the suite and the known concepts, as the cells saw them

    def __post_init__(self) -> None:
        for key in ("variants", "concepts", "seeds", "sizes"):
            got = getattr(self, key)
            if len(set(got)) < len(got) or not (got or key == "sizes"):
                raise SboraError(f"got the {key} {' '.join(map(str, got)) or '(none)'}, expected different ones")
        allowed = [size for size in range(1, len(self.concepts) + 1) if len(self.concepts) % size == 0]
        for size in self.sizes:
            if size not in allowed:
                told = ", ".join(map(str, allowed))
                raise SboraError(f"{len(self.concepts)} concepts make no merges of {size}", f"allowed are {told}")

    @classmethod
    def load(cls, folder: Path) -> "Comparison":
        """Inverse of `save`."""
        said: dict[str, Any] = json.loads((folder / "comparison.json").read_bytes())
        lists = {key: tuple(value) for key, value in said.items() if isinstance(value, list)}
        return cls(**{**said, **lists})

    def save(self, folder: Path) -> None:
        """Write it down; SboraError if cells of other conditions lie in the folder (more cells may be added)."""
        digests = _digests(self.suite)
        if (folder / "comparison.json").exists():
            before = asdict(Comparison.load(folder))
            for key in ("base", "suite", "judge", "settings", "concepts"):
                if before[key] != getattr(self, key):
                    raise SboraError(f"{folder} holds a comparison of {key} {before[key]}", "choose another --out")
            _check_same(folder, before["digests"], digests)
            digests = before["digests"]
        write_atomically(folder / "comparison.json", json.dumps(asdict(self) | {"digests": digests}, indent=1).encode())

    def config(self, variant: str, seed: int) -> TrainConfig:
        """The recipe of a variant, with the common settings and its own over it."""
        method, own = parts_of(trained_as(variant))
        settings = self.settings | own | {"seed": str(seed), "preview_every": "0"}
        return configure(recipe_base(self.base), method, settings)

    def groups(self, size: int) -> list[tuple[str, ...]]:
        """Neighbours, so that every concept is in one merge of each size."""
        return [self.concepts[start : start + size] for start in range(0, len(self.concepts), size)]

    def trainings(self) -> Iterator[str]:
        """Keys of the cells to train."""
        variants = dict.fromkeys(map(trained_as, self.variants))
        yield from (f"{v}/{seed}/{name}" for seed in self.seeds for v in variants for name in self.concepts)

    def merges(self) -> Iterator[str]:
        """Keys of the cells to judge, single concepts (size 1) first."""
        for size in self.sizes:
            for seed in self.seeds:
                for variant in self.variants:
                    yield from (f"{variant}/{seed}/{'+'.join(names)}" for names in self.groups(size))


def _digests(suite: str) -> dict[str, str]:
    """Of what cells are judged by: the suite, and all concepts' images, for success is told among all of them."""
    known = {name: image_digest(load_concept(name, default_roots())) for name in known_concepts(default_roots())}
    return {f"the suite {suite}": load_suite(suite).sha256} | {f"concept {name}": told for name, told in known.items()}


def _check_same(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """SboraError if the folder's cells were judged by something else; older folders do not tell."""
    changed = [name for name in {**before, **now} if before and before.get(name) != now.get(name)]
    if changed:
        raise SboraError(f"{', '.join(changed)} changed since the cells in {folder} were made", "choose another --out")


def parts_of(variant: str) -> tuple[str, dict[str, str]]:
    """Its method, and what it sets."""
    method, _, own = variant.partition(":")
    pairs = [pair.partition("=") for pair in own.split(",") if pair]
    if any(not equals for _, equals, _ in pairs):
        raise SboraError(f"got {variant!r}, expected method or method:key=value,key=value")
    return method, {key: value for key, _, value in pairs}


def trained_as(variant: str) -> str:
    """The variant that trains its adapters: itself, but for how it merges."""
    method, own = parts_of(variant)
    settings = ",".join(f"{key}={value}" for key, value in own.items() if key != "merge")
    return f"{method}:{settings}" if settings else method


def path_of(folder: Path, kind: str, key: str) -> Path:
    """Where a cell's result lies; kind is "trained" or "scores"."""
    return folder / kind / f"{key}.json"
