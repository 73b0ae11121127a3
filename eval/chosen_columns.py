"""Other ways to choose an SBoRA adapter's columns (or rows) than by chance, as an experiment: what is gained by them?

The package hands out intervals of seeded permutations. Here, for a whole set of concepts at once and still disjoint:

- energy: the columns with the largest E[x²] of their inputs on the prior prompts, dealt out like cards.
- gradient: each concept in turn takes, of the columns that are free, those in which the gradient of its own images'
  loss (under captions of its class) is largest; of SBoRA-FB the rows.
- contrast: the same, with the squared gradient over E[x²] on the prior prompts: most learned at the least loudness. Of
  SBoRA-FB the rows, over the squared gradient on the base model's own images of the prior prompts.
- width: columns by chance, but in each layer rank · (layer's width / narrowest width) of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sbora_diffusion.adapters import file
from sbora_diffusion.adapters import layer as attaching
from sbora_diffusion.adapters.basis import canonical, permutation
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept, default_roots, load_concept
from sbora_diffusion.data.latents import Batch, EncodedImages, prior_latents
from sbora_diffusion.methods import live
from sbora_diffusion.methods.live import lora_config
from sbora_diffusion.methods.registry import method_side
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Noising
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.losses.base import mean_error
from sbora_diffusion.utils.text import say_plainly

KINDS = ("energy", "gradient", "contrast", "width")
BATCHES, BATCH = 16, 8

Columns = dict[str, Tensor]  # canonical layer -> (r,) int64


def choose(kind: str, names: Sequence[str], base: Base, config: TrainConfig, path: Path) -> None:
    """Choose disjoint columns for all concepts, in their order, and save them: concept -> Columns."""
    chosen: dict[str, Columns] = {name: {} for name in names}
    widths = base.widths(method_side(config.method.name))
    narrowest = min(widths.values())
    free = {key: torch.ones(width, dtype=torch.bool) for key, width in widths.items()}
    for number, name in enumerate(names):
        scores = {} if kind == "width" else _scores(kind, load_concept(name, default_roots()), base, config)
        for key, width in widths.items():
            layer = key.partition(".")[2]
            if kind == "width":
                share = width // narrowest * config.method.rank
                index = permutation(layer, width, config.method.basis_seed)[number * share : (number + 1) * share]
            elif kind == "energy":
                index = scores[key].argsort(descending=True)[number :: len(names)][: config.method.rank]
            else:
                index = scores[key].masked_fill(~free[key], -torch.inf).topk(config.method.rank).indices
            free[key][index] = False
            chosen[name][layer] = index
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(chosen, path)


def _scores(kind: str, concept: Concept, base: Base, config: TrainConfig) -> dict[str, Tensor]:
    """How much each column (or row) of each layer is wanted: layer -> (in,) or (out,) float64."""
    data = prepare_data(
        concept, base, config.with_settings(output_penalty=1.0, blocks=())
    )  # so that all layers are recorded
    energy = {key: moments.diagonal() for key, moments in data.moments.items()}
    if kind == "energy":
        return energy
    said = [say_plainly(text, concept.token, concept.class_noun) for text in data.images[0].captions]
    squares = _squared_gradients(replace(data.images[0], captions=said), data.noising, base, config)
    if kind == "gradient":
        return squares
    of_others = energy
    if method_side(config.method.name) == "fb":
        drawn = EncodedImages(prior_latents(base, config), list(config.loss.prior_prompts))
        of_others = _squared_gradients(drawn, data.noising, base, config)
    return {key: square / (of_others[key] + 1e-3 * of_others[key].mean()) for key, square in squares.items()}


def _squared_gradients(shots: EncodedImages, noising: Noising, base: Base, config: TrainConfig) -> dict[str, Tensor]:
    """Of the base model's loss on images: summed over each column (fa) or row (fb) of each layer's weight."""
    side = method_side(config.method.name)
    weights = {key: layer.weight for key, layer in base.layers.items()}
    squares = {key: torch.zeros(width, dtype=torch.float64) for key, width in base.widths(side).items()}
    ids, generator = base.tokenize(shots.captions), torch.Generator().manual_seed(config.seed)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for _ in range(BATCHES):
            rows = torch.randint(len(shots.latents), (BATCH,), generator=generator)
            t = noising.timesteps(BATCH, generator).to(base.device)
            latents = shots.latents[rows]
            noise = torch.randn(latents.shape, generator=generator).to(base.device)
            batch = Batch(noising.add(latents, noise, t), t, ids[rows], noising.target(latents, noise, t))
            loss = mean_error(base.predict(batch.noisy, batch.t, base.encode_text(batch.ids)), batch, masked=False)
            for key, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                squares[key] += gradient.double().pow(2).sum(0 if side == "fa" else 1).cpu()
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return squares


@contextmanager
def chosen_columns(path: Path, name: str) -> Iterator[None]:
    """Meanwhile a training of the concept writes the columns that were chosen for it."""
    columns: Columns = torch.load(path, weights_only=True)[name]

    def indices(layer: str, *_: Any) -> Tensor:
        return columns[canonical(layer)]

    def config(rank: int, targets: list[str]) -> Any:
        result = lora_config(rank, targets)
        ends = tuple(f".{target}" for target in targets)
        ranks: Mapping[str, int] = {layer: len(index) for layer, index in columns.items() if layer.endswith(ends)}
        result.rank_pattern = result.alpha_pattern = {f"^(.*\\.)?{layer}": rank for layer, rank in ranks.items()}
        return result

    with (
        patch.object(attaching, "indices", indices),
        patch.object(attaching, "_check_attachable", lambda *_: None),
        patch.object(live, "lora_config", config),
        any_rank(),
    ):
        yield


def any_rank() -> AbstractContextManager[Any]:
    """Meanwhile a concept file may hold another number of columns in each layer."""
    return patch.object(file, "_check", lambda _: None)
