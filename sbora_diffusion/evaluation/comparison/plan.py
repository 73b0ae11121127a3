"""What a comparison of methods compares, and where its cells are."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sbora_diffusion.data.concept import default_roots, known_concepts, load_concept
from sbora_diffusion.evaluation.suites import load_suite
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.loading import recipe_base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import image_digest
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_bytes, read_json, write_file
from sbora_diffusion.utils.text import parse_toml


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants of methods with the same base model, images and prompts, and settings over those of their recipes."""

    variants: tuple[str, ...]  # "lora", "lora:rank=4,learning_rate=1e-3", or "sbora-fa:merge=sum" for a way to merge
    concepts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)  # of trainings and images
    sizes: tuple[int, ...] = (1,)  # numbers K of concepts merged at once; 1 is each concept by itself
    base: str = "emoji64"
    suite: str = "emoji64"
    judge: str = "emoji-clip"
    settings: dict[str, str] = field(default_factory=dict)  # of all recipes
    digests: dict[str, str] = field(default_factory=dict)  # of suite and concepts when the first cells were computed

    def __post_init__(self) -> None:
        for key in ("variants", "concepts", "seeds", "sizes"):
            got = getattr(self, key)
            if len(set(got)) < len(got) or not (got or key == "sizes"):
                raise SboraError(
                    f"got the {key} {' '.join(map(str, got)) or '(none)'}, expected at least one, all different"
                )
        allowed = [size for size in range(1, len(self.concepts) + 1) if len(self.concepts) % size == 0]
        for size in self.sizes:
            if size not in allowed:
                listed = ", ".join(map(str, allowed))
                raise SboraError(f"got {len(self.concepts)} concepts and merges of {size}", f"choose from {listed}")

    @classmethod
    def load(cls, folder: Path) -> "Comparison":
        """Read what `save` wrote."""
        return cls.from_dict(read_json(folder / "comparison.json"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """Build a comparison from JSON or TOML values."""
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise SboraError(f"got unknown key {unknown[0]!r}", f"allowed are {', '.join(cls.__dataclass_fields__)}")
        lists: dict[str, Any] = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    def save(self, folder: Path) -> None:
        """Write comparison.json; SboraError if the folder has cells of other conditions. More cells may be added."""
        digests = _digests(self.suite)
        if (folder / "comparison.json").exists():
            before = asdict(Comparison.load(folder))
            for key in ("base", "suite", "judge", "settings", "concepts"):
                if before[key] != getattr(self, key):
                    raise SboraError(f"{folder} holds a comparison with {key} {before[key]}", "choose another --out")
            _check_same(folder, before["digests"], digests)
            digests = before["digests"]
        write_file(
            folder / "comparison.json",
            json.dumps(asdict(self) | {"digests": digests}, indent=1).encode(),
            overwrite=True,
        )

    def config(self, variant: str, seed: int) -> TrainConfig:
        """Return the recipe of a variant, with the common settings and its own over it."""
        method, own = parts_of(trained_as(variant))
        settings = self.settings | own | {"seed": str(seed), "preview_every": "0"}
        return configure(recipe_base(self.base), method, settings)

    def groups(self, size: int) -> list[tuple[str, ...]]:
        """Return groups of neighbours, so that every concept is in one merge of each size."""
        return [self.concepts[start : start + size] for start in range(0, len(self.concepts), size)]

    def trainings(self) -> Iterator[str]:
        """Yield the keys of the trainings."""
        variants = dict.fromkeys(map(trained_as, self.variants))
        yield from (f"{v}/{seed}/{name}" for seed in self.seeds for v in variants for name in self.concepts)

    def merges(self) -> Iterator[str]:
        """Yield the keys of the scored merges, size by size; merges of size 1 are the single concepts."""
        for size in self.sizes:
            for seed in self.seeds:
                for variant in self.variants:
                    yield from (f"{variant}/{seed}/{'+'.join(names)}" for names in self.groups(size))


def _digests(suite: str) -> dict[str, str]:
    """Return digests of the suite and of all known concepts' images, on which success depends."""
    known = {f"concept {name}": load_concept(name, default_roots()) for name in known_concepts(default_roots())}
    return {f"the suite {suite}": load_suite(suite).sha256} | {key: image_digest(each) for key, each in known.items()}


def _check_same(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise SboraError if suite or concepts are not those of the folder's cells, as far as their digests are known."""
    changed = [name for name in {**before, **now} if before and before.get(name) != now.get(name)]
    if changed:
        raise SboraError(
            f"{', '.join(changed)} changed since the cells in {folder} were computed", "choose another --out"
        )


def load_plan(name: str) -> Comparison:
    """Read a comparison from a TOML file: "FILE.toml", or "FILE.toml#PART" for one of the file's tables.

    Raises:
        SboraError: no such file or part, unknown keys, or values that cannot be compared.
    """
    file, _, part = name.partition("#")
    try:
        content = parse_toml(read_bytes(Path(file)).decode())
    except (OSError, ValueError) as error:
        raise SboraError(f"cannot read the plan {file}: {error}") from None
    if part and part not in content:
        raise SboraError(f"{file} has no part {part!r}", f"choose from {', '.join(content)}")
    return Comparison.from_dict(content[part] if part else content)


def parts_of(variant: str) -> tuple[str, dict[str, str]]:
    """Return the variant's method and settings."""
    method, _, own = variant.partition(":")
    pairs = [pair.partition("=") for pair in own.split(",") if pair]
    if any(not equals for _, equals, _ in pairs):
        raise SboraError(f"got {variant!r}, expected method or method:key=value,key=value")
    return method, {key: value for key, _, value in pairs}


def trained_as(variant: str) -> str:
    """Return the variant without its way to merge, under which its adapters are trained."""
    method, own = parts_of(variant)
    settings = ",".join(f"{key}={value}" for key, value in own.items() if key != "merge")
    return f"{method}:{settings}" if settings else method


def path_of(folder: Path, kind: str, key: str) -> Path:
    """Return the path of a cell's result; kind is "trained" or "scores"."""
    return folder / kind / f"{key}.json"
