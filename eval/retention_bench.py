"""The cells of the retention study that are not trainings: merges, their objective, and scored images."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from inputs import CachedInputs
from retention_study import Cell, Study
from torch import Tensor

from sbora_diffusion.adapters.baseline_merges import STEPS, gradient_fusion
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.adapters.fuse import RIDGE, full_support, fuse, objective
from sbora_diffusion.adapters.merge import merge, put_together
from sbora_diffusion.evaluation.comparison.cells import generate_all
from sbora_diffusion.evaluation.images import all_concepts, reference_images
from sbora_diffusion.evaluation.judges import load_judge
from sbora_diffusion.evaluation.judges.base import prepare
from sbora_diffusion.evaluation.suites import load_suite
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.models.base import Base, load_base

log = logging.getLogger("retention")

PRIOR_WEIGHT = 1.0  # the same for every way to merge; the committed results were measured with it
METRICS = ("text_mos", "image", "success")


class Bench:
    """The loaded base model and judge, and the trained adapters of one (scheme, seed)."""

    def __init__(self, study: Study, scheme: str, seed: int) -> None:
        self.study, self.scheme, self.seed = study, scheme, seed
        self.base: Base = load_base(study.base)
        self.adapters = {name: self._load(name) for name in study.concepts}
        self.concepts = {concept.name: concept for concept in all_concepts()}
        self.scorer = prepare([load_judge(study.judge)], reference_images(self.concepts.values()))
        self.suite = load_suite(study.suite)
        self.inputs = CachedInputs(self.base, list(self.adapters.values()))

    def _load(self, name: str) -> Adapter:
        adapter = Adapter.load(self.study.adapter_path(self.scheme, self.seed, name))
        # merges require one basis seed; the factors themselves say which columns they are
        return replace(adapter, spec=replace(adapter.spec, seed=0))

    def merged(self, how: str, names: Sequence[str]) -> tuple[Adapter, dict[str, float]]:
        """Return a merge, its time (without sampling of inputs) and its objective."""
        adapters, weights = [self.adapters[name] for name in sorted(names)], [1.0] * len(names)
        for adapter in (*adapters, None):
            self.inputs.moments(adapter)
        began = time.perf_counter()
        if how == "sum":
            result = merge(adapters, weights, "sum")
        elif how == "fuse:loud":
            result = fuse(adapters, weights, self.inputs)
        elif how.startswith("fuse"):
            prior_weight = float(how.partition(":")[2] or PRIOR_WEIGHT)
            result = fuse(adapters, weights, self.inputs, prior_weight=prior_weight, match_response=False)
        else:
            keys = sorted({key for adapter in adapters for key in adapter.factors})
            solved = {key: self._dense(how, key, adapters).float() for key in keys}
            factors = {key: Factor(torch.arange(delta.shape[1]), delta) for key, delta in solved.items()}
            result = put_together(adapters, weights, factors, {"how": how})
        seconds = time.perf_counter() - began
        nothing, reached = self._objectives(result, adapters)
        return result, {"seconds": seconds, "objective": reached, "objective of nothing": nothing}

    def _dense(self, how: str, key: str, adapters: Sequence[Adapter]) -> Tensor:
        deltas = [self._delta(adapter, key) for adapter in adapters]
        moments, prior = [self.inputs.moments(adapter)[key] for adapter in adapters], self.inputs.moments(None)[key]
        if how == "full":
            return full_support(deltas, moments, prior, prior_weight=PRIOR_WEIGHT, ridge=RIDGE)
        steps, device = STEPS[key.partition(".")[0]], self.base.device
        deltas, moments = ([each.to(device) for each in tensors] for tensors in (deltas, moments))
        return gradient_fusion(deltas, moments, prior.to(device), prior_weight=PRIOR_WEIGHT, steps=steps).cpu()

    def _delta(self, adapter: Adapter, key: str) -> Tensor:
        """Return (out, in) float64."""
        delta, factor = torch.zeros(self.base.layer_shapes[key], dtype=torch.float64), adapter.factors.get(key)
        return delta.index_copy_(1, factor.index, factor.weight.double()) if factor else delta

    def _objectives(self, result: Adapter, adapters: Sequence[Adapter]) -> tuple[float, float]:
        """Return means over the layers: the objective of no delta, and that of the result as a fraction of it."""
        nothing, shares = [], []
        for key in result.factors:
            deltas = [self._delta(adapter, key) for adapter in adapters]
            moments, prior = [self.inputs.moments(adapter)[key] for adapter in adapters], self.inputs.moments(None)[key]
            nothing.append(objective(torch.zeros_like(deltas[0]), deltas, moments, prior, PRIOR_WEIGHT))
            reached = objective(self._delta(result, key), deltas, moments, prior, PRIOR_WEIGHT)
            shares.append(reached / nothing[-1])
        return torch.stack(nothing).mean().item(), torch.stack(shares).mean().item()

    def score(self, adapter: Adapter, cell: Cell) -> dict[str, dict[str, list[float]]]:
        """Generate and score each concept of a cell by an adapter: name -> metric -> one score for each prompt."""
        how, size, names = cell
        scores, rows = {}, []
        with applied(self.base, [adapter]):
            for name in names:
                concept = self.concepts[name]
                prompts = self.suite.bind([concept.token])
                images = generate_all(self.base, prompts, self.seed, self.study.sampling_steps)
                found = self.scorer(images, prompts, {concept.token: concept.class_noun}, [name])[name]
                scores[name] = {metric: [round(x, 4) for x in found[metric].tolist()] for metric in METRICS}
                rows.append((f"<{name}>, {how} of {size}", [("", image) for image in images[:10]]))
        page = self.study.folder / "sheets" / f"{self.scheme}-{self.seed}-{how}-{size}-{names[0]}.png"
        page.parent.mkdir(parents=True, exist_ok=True)
        sheet(rows, cell=64).save(page)
        return scores


def judge_all(study: Study, scheme: str, seed: int) -> None:
    """Compute every missing merge and score of one (scheme, seed)."""
    missing, found = study.missing(scheme, seed), study.found(scheme, seed)
    if not missing:
        return
    bench = Bench(study, scheme, seed)
    for cell in missing:
        how, _, names = cell
        log.info("%s-%d: %s of %s", scheme, seed, how, "+".join(names))
        adapter, costs = (bench.adapters[names[0]], {}) if how == "single" else bench.merged(how, names)
        found.add(cell, bench.score(adapter, cell), costs)
