"""The cells of the retention study that are not trainings: merges, their objective, and judged images."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image
from retention_study import Cell, Study
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.adapters.fuse import RIDGE, full_support, fuse, objective
from sbora_diffusion.adapters.lbfgs import STEPS, gradient_fusion
from sbora_diffusion.adapters.merge import merge, put_together
from sbora_diffusion.data.concept import Concept, default_roots, known_concepts, load_concept
from sbora_diffusion.evaluation.encoders import load_encoder
from sbora_diffusion.evaluation.scores import Judge, instruct, reference_images, score
from sbora_diffusion.evaluation.suite import load_suite
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.methods.calibration import SampledInputs
from sbora_diffusion.models.base import Base, load_base

log = logging.getLogger("retention")

PRIOR_WEIGHT = 1.0  # of every way to merge alike; what is committed was measured with it
BATCH = 20  # images at once
METRICS = ("text_mos", "image", "success")


class Bench:
    """The loaded base model and judge, and what was computed for one (scheme, seed)."""

    def __init__(self, study: Study, scheme: str, seed: int) -> None:
        self.study, self.scheme, self.seed = study, scheme, seed
        self.base: Base = load_base(study.base)
        self.adapters = {name: self._load(name) for name in study.concepts}
        known = {name: load_concept(name, default_roots()) for name in known_concepts(default_roots())}
        self.concepts: dict[str, Concept] = known
        self.judge: Judge = instruct(load_encoder(study.judge), reference_images(known.values()), None)
        self.suite = load_suite(study.suite)
        self._inputs = SampledInputs(self.base, list(self.adapters.values()))
        self._moments: dict[str | None, dict[str, Tensor]] = {}

    def _load(self, name: str) -> Adapter:
        adapter = Adapter.load(self.study.adapter_path(self.scheme, self.seed, name))
        # merges want one basis seed; what is merged are the factors, and these say which columns they are
        return replace(adapter, spec=replace(adapter.spec, seed=0))

    def moments(self, adapter: Adapter | None) -> dict[str, Tensor]:
        """Of all columns, in float64; each drawn once."""
        name = adapter.spec.name if adapter else None
        if name not in self._moments:
            every = {key: torch.arange(shape[1]) for key, shape in self.base.layer_shapes.items()}
            self._moments[name] = self._inputs(adapter, every)
        return self._moments[name]

    def inputs(self, adapter: Adapter | None, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `fuse` asks for."""
        return {key: self.moments(adapter)[key][index][:, index] for key, index in columns.items()}

    def merged(self, how: str, names: Sequence[str]) -> tuple[Adapter, dict[str, float]]:
        """A merge, its time (without the drawing) and its objective."""
        adapters, weights = [self.adapters[name] for name in sorted(names)], [1.0] * len(names)
        for adapter in (*adapters, None):
            self.moments(adapter)
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
        moments, prior = [self.moments(adapter)[key] for adapter in adapters], self.moments(None)[key]
        if how == "full":
            return full_support(deltas, moments, prior, prior_weight=PRIOR_WEIGHT, ridge=RIDGE)
        steps, device = STEPS[key.partition(".")[0]], self.base.device
        deltas, moments = ([each.to(device) for each in tensors] for tensors in (deltas, moments))
        return gradient_fusion(deltas, moments, prior.to(device), prior_weight=PRIOR_WEIGHT, steps=steps).cpu()

    def _delta(self, adapter: Adapter, key: str) -> Tensor:
        """(out, in) float64."""
        delta, factor = torch.zeros(self.base.layer_shapes[key], dtype=torch.float64), adapter.factors.get(key)
        return delta.index_copy_(1, factor.index, factor.weight.double()) if factor else delta

    def _objectives(self, result: Adapter, adapters: Sequence[Adapter]) -> tuple[float, float]:
        """Mean over the layers of the objective of no delta at all, and of the result as a share of that."""
        nothing, shares = [], []
        for key in result.factors:
            deltas = [self._delta(adapter, key) for adapter in adapters]
            moments, prior = [self.moments(adapter)[key] for adapter in adapters], self.moments(None)[key]
            nothing.append(objective(torch.zeros_like(deltas[0]), deltas, moments, prior, PRIOR_WEIGHT))
            reached = objective(self._delta(result, key), deltas, moments, prior, PRIOR_WEIGHT)
            shares.append(reached / nothing[-1])
        return torch.stack(nothing).mean().item(), torch.stack(shares).mean().item()

    def score(self, adapter: Adapter, cell: Cell) -> dict[str, dict[str, list[float]]]:
        """Draw and judge each concept of a cell with what is given: name -> metric -> a number a prompt."""
        how, size, names = cell
        told, rows = {}, []
        with applied(self.base, [adapter]):
            for name in names:
                concept = self.concepts[name]
                prompts = self.suite.bind([concept.token])
                images = self._images(prompts)
                found = score(images, prompts, self.judge, {concept.token: concept.class_noun}, [name])[name]
                told[name] = {metric: [round(x, 4) for x in found[metric].tolist()] for metric in METRICS}
                rows.append((f"<{name}>, {how} of {size}", [("", image) for image in images[:10]]))
        page = self.study.folder / "sheets" / f"{self.scheme}-{self.seed}-{how}-{size}-{names[0]}.png"
        page.parent.mkdir(parents=True, exist_ok=True)
        sheet(rows, cell=64).save(page)
        return told

    def _images(self, prompts: Sequence[str]) -> list[Image.Image]:
        batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
        steps = self.study.sampling_steps
        drawn = [generate(self.base, texts, seeds=[self.seed] * len(texts), steps=steps) for texts in batches]
        return [image for images in drawn for image in images]


def judge_all(study: Study, scheme: str, seed: int) -> None:
    """Every merge and score of one (scheme, seed) that is not there yet."""
    missing, found = study.missing(scheme, seed), study.found(scheme, seed)
    if not missing:
        return
    bench = Bench(study, scheme, seed)
    for cell in missing:
        how, _, names = cell
        log.info("%s-%d: %s of %s", scheme, seed, how, "+".join(names))
        adapter, told = (bench.adapters[names[0]], {}) if how == "single" else bench.merged(how, names)
        found.add(cell, bench.score(adapter, cell), told)
