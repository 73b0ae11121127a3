"""What came out of an evaluation: every score of every image, their means, and what a merge changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sbora_diffusion.evaluation.alignment import bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts and seeds, and its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """Of (prompts, seeds) scores."""
        low, high = bootstrap_interval(values)
        return cls(mean=values.double().mean().item(), low=low, high=high)


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """How well the images of one model show one concept."""

    model: str  # "single": the concept's own adapter; "merged"; "together": several adapters at once
    concept: str
    shown: tuple[str, ...]  # all concepts that the images are to show, this one among them
    prompts: tuple[str, ...]  # as they were given to the model
    images: tuple[tuple[Path, ...], ...]  # files by prompt and seed
    scores: dict[str, Tensor]  # metric -> (prompts, seeds)

    def estimates(self) -> dict[str, Estimate]:
        return {metric: Estimate.of(values) for metric, values in self.scores.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Results, and all that is needed to get them again."""

    title: str
    about: dict[str, Any]  # JSON values
    results: tuple[Result, ...]
    references: dict[str, list[Image.Image]]  # what the shown concepts look like

    def retention(self) -> dict[str, dict[str, Estimate]]:
        """For each concept evaluated alone and merged: merged minus single, prompt by prompt and seed by seed."""
        single = {result.shown: result.scores for result in self.results if result.model == "single"}
        return {
            result.concept: {m: Estimate.of(after - single[result.shown][m]) for m, after in result.scores.items()}
            for result in self.results
            if result.model == "merged" and result.shown in single
        }
