"""What an evaluation returns: the scores of every image, their means, and what a merge changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sbora_diffusion.evaluation.judges.base import Metric
from sbora_diffusion.evaluation.metrics.bootstrap import Estimate


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """How well the images of one model show one concept.

    Attributes:
        model: "single": the concept's own adapter; "merged": a merge; "together": several adapters at once.
        shown: all concepts that the images are to show, this one among them.
        prompts: as they were given to the model.
        images: files by prompt and seed.
        scores: metric -> (prompts, seeds).
    """

    model: str
    concept: str
    shown: tuple[str, ...]
    prompts: tuple[str, ...]
    images: tuple[tuple[Path, ...], ...]
    scores: dict[str, Tensor]

    def estimates(self) -> dict[str, Estimate]:
        """Return the mean of each metric with its interval."""
        return {metric: Estimate.of(values) for metric, values in self.scores.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Results, and all that is needed to obtain them again.

    Attributes:
        about: adapters, suite, judges, sampling, versions and so on, in JSON values.
        metrics: what the judges score, in the order of tables.
        references: the reference images of the shown concepts.
        files: what was written: tables, JSON, image grids.
    """

    title: str
    about: dict[str, Any]
    metrics: Mapping[str, Metric]
    results: tuple[Result, ...]
    references: dict[str, list[Image.Image]]
    files: tuple[Path, ...] = ()

    def retention(self) -> dict[str, dict[str, Estimate]]:
        """Return merged minus single, prompt by prompt and seed by seed, for each concept evaluated in both ways."""
        single = {result.shown: result.scores for result in self.results if result.model == "single"}
        return {
            result.concept: {m: Estimate.of(after - single[result.shown][m]) for m, after in result.scores.items()}
            for result in self.results
            if result.model == "merged" and result.shown in single
        }
