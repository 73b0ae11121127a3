"""The cells of the retention study that are not trainings: merges, their objective, and judged pictures."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from retention_study import Study, planned
from torch import Tensor

from sbora_diffusion.adapter.file import Adapter, Factor, write_atomically
from sbora_diffusion.adapter.fuse import RIDGE, full_support, fuse, objective
from sbora_diffusion.adapter.lbfgs import STEPS, gradient_fusion
from sbora_diffusion.adapter.merge import merge, put_together
from sbora_diffusion.diffusion.base import Base, load_base
from sbora_diffusion.diffusion.concept import Concept, default_roots, known_concepts, load_concept
from sbora_diffusion.diffusion.generate import applied, generate
from sbora_diffusion.diffusion.moments import DrawnInputs
from sbora_diffusion.diffusion.sheet import sheet
from sbora_diffusion.evaluation.encoders import load_encoder
from sbora_diffusion.evaluation.scores import Judge, instruct, reference_pictures, score
from sbora_diffusion.evaluation.suite import load_suite

log = logging.getLogger("retention")

PRIOR_WEIGHT = 1.0
BATCH = 10  # pictures at once


class Bench:
    """The loaded base model and judge, and what was computed for one (scheme, seed)."""

    def __init__(self, study: Study, scheme: str, seed: int) -> None:
        self.study, self.scheme, self.seed = study, scheme, seed
        self.base: Base = load_base(study.base)
        self.adapters = {name: self._load(name) for name in study.concepts}
        known = {name: load_concept(name, default_roots()) for name in known_concepts(default_roots())}
        self.concepts: dict[str, Concept] = known
        self.judge: Judge = instruct(load_encoder(study.judge), reference_pictures(known.values()), None)
        self.suite = load_suite(study.suite)
        self._inputs = DrawnInputs(self.base, list(self.adapters.values()))
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

    def merged(self, how: str, names: Sequence[str]) -> Adapter:
        """A merge; its time (without the drawing) and its objective are written down."""
        adapters, weights = [self.adapters[name] for name in sorted(names)], [1.0] * len(names)
        for adapter in (*adapters, None):
            self.moments(adapter)
        began = time.perf_counter()
        if how == "sum":
            result = merge(adapters, weights, "sum")
        elif how == "fuse":
            result = fuse(adapters, weights, self.inputs, prior_weight=PRIOR_WEIGHT)
        else:
            factors = {key: Factor(torch.arange(shape[1]), self._dense(how, key, adapters).float())
                       for key, shape in self.base.layer_shapes.items()}  # fmt: skip
            result = put_together(adapters, weights, factors, {"how": how})
        seconds = time.perf_counter() - began
        own, reached = self._objectives(result, adapters)
        told = {"seconds": seconds, "objective": reached, "objective of nothing": own}
        path = self.study.merge_path(self.scheme, self.seed, how, names)
        write_atomically(path, json.dumps(told).encode())
        return result

    def _dense(self, how: str, key: str, adapters: Sequence[Adapter]) -> Tensor:
        deltas = [self._delta(adapter, key) for adapter in adapters]
        moments, prior = [self.moments(adapter)[key] for adapter in adapters], self.moments(None)[key]
        if how == "full":
            return full_support(deltas, moments, prior, prior_weight=PRIOR_WEIGHT, ridge=RIDGE)
        steps = STEPS[key.partition(".")[0]]
        return gradient_fusion(deltas, moments, prior, prior_weight=PRIOR_WEIGHT, steps=steps)

    def _delta(self, adapter: Adapter, key: str) -> Tensor:
        """(out, in) float64."""
        delta, factor = torch.zeros(self.base.layer_shapes[key], dtype=torch.float64), adapter.factors[key]
        return delta.index_copy_(1, factor.index, factor.weight.double())

    def _objectives(self, result: Adapter, adapters: Sequence[Adapter]) -> tuple[float, float]:
        """Mean over the layers of the objective of no delta at all, and of the result as a share of that."""
        nothing, shares = [], []
        for key in self.base.layer_shapes:
            deltas = [self._delta(adapter, key) for adapter in adapters]
            moments, prior = [self.moments(adapter)[key] for adapter in adapters], self.moments(None)[key]
            nothing.append(objective(torch.zeros_like(deltas[0]), deltas, moments, prior, PRIOR_WEIGHT))
            reached = objective(self._delta(result, key), deltas, moments, prior, PRIOR_WEIGHT)
            shares.append(reached / nothing[-1])
        return torch.stack(nothing).mean().item(), torch.stack(shares).mean().item()

    def score(self, adapter: Adapter, how: str, size: int, names: Sequence[str]) -> None:
        """Draw and judge each of these concepts with what is given, and write down every number."""
        rows = []
        with applied(self.base, [adapter]):
            for name in names:
                concept = self.concepts[name]
                prompts = self.suite.bind([concept.token])
                pictures = []
                for start in range(0, len(prompts), BATCH):
                    texts = prompts[start : start + BATCH]
                    pictures += generate(self.base, texts, seeds=[self.seed] * len(texts))
                found = score(pictures, prompts, self.judge, {concept.token: concept.class_noun}, [name])[name]
                told = {metric: [round(x, 5) for x in values.tolist()] for metric, values in found.items()}
                path = self.study.cell_path(self.scheme, self.seed, how, size, name)
                write_atomically(path, json.dumps(told).encode())
                rows.append((f"<{name}>, {how} of {size}", [("", picture) for picture in pictures[:10]]))
        page = self.study.folder / "sheets" / f"{self.scheme}-{self.seed}-{how}-{size}-{names[0]}.png"
        page.parent.mkdir(parents=True, exist_ok=True)
        sheet(rows, cell=64).save(page)


def judge_all(study: Study, scheme: str, seed: int) -> None:
    """Every merge and score of one (scheme, seed) that is not there yet."""
    bench: Bench | None = None
    for how, size, names in planned(study):
        if all(study.cell_path(scheme, seed, how, size, name).exists() for name in names):
            continue
        bench = bench or Bench(study, scheme, seed)
        log.info("%s-%d: %s of %s", scheme, seed, how, "+".join(names))
        bench.score(bench.adapters[names[0]] if how == "single" else bench.merged(how, names), how, size, names)
