"""Every method's own merge, with what it has to ask of the base model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sbora_diffusion.adapters.baseline_merges import fuse_by_gradient, merge_constrained, weighted_sum
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.fuse import fuse
from sbora_diffusion.adapters.merge import check_mergeable, in_order, put_together
from sbora_diffusion.adapters.merge import merge as sum_adapters
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.library.library import Library, load_adapters
from sbora_diffusion.methods.calibration import SampledInputs, own_prompts, prior_prompts
from sbora_diffusion.methods.registry import default_weights, merge_choice
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.utils.errors import SboraError


def merge(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[float] | None = None,
    how: str = "",
    base: Base | str | None = None,
    prior_weight: float = 0.3,
    on_progress: Callable[[int, int], None] | None = None,
    library: Library | str | Path = "adapters",
) -> Adapter:
    """Merge adapters of one method.

    Args:
        adapters: adapters, names in the library, or paths.
        weights: one factor an adapter; None for what the method says.
        how: one of the method's merges; "" for the first.
        base: the base model or its name, for merges that need it; None is what the first adapter was trained for.
        prior_weight: how strongly `fuse` preserves everything else.
        on_progress: called with (done, total) while the base model is sampled.
    """
    if not 0 <= prior_weight < float("inf"):
        raise SboraError(f"got prior_weight={prior_weight}, expected a number from 0 on")
    found = load_adapters(adapters, library)
    spec = found[0].spec
    how = merge_choice(spec.method_name, how)
    if how == "sum" and not spec.method:
        return sum_adapters(found, weights or [1.0] * len(found), how)
    loaded = base if isinstance(base, Base) else load_base(base or spec.base_id, "fp32" if spec.method else "")
    if spec.method:
        return merge_by_method(loaded, found, weights, how)
    inputs, total, done = SampledInputs(loaded, found), len(found) + bool(prior_weight), iter(range(1, 1000))

    def sampled(adapter: Adapter | None, columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = inputs(adapter, columns)
        if on_progress:
            on_progress(next(done), total)
        return found

    return fuse(found, weights or [1.0] * len(found), sampled, prior_weight=prior_weight)


def merge_by_method(
    base: Base, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, how: str = ""
) -> Adapter:
    """Merge adapters of one method as its paper does.

    Args:
        weights: one factor an adapter; None for what the method says (methods.default_weights).
        how: one of the method's merges; "" for the first.

    Raises:
        SboraError: adapters of several methods or bases, a way that the method has not.
    """
    check_mergeable([adapter.spec for adapter in adapters])
    name = adapters[0].spec.method_name
    how = merge_choice(name, how)
    weights = weights or default_weights(name, how, len(adapters))
    if how == "tokens":
        adapters, weights = in_order(adapters, weights)
        return put_together(adapters, weights, {}, {"how": how})
    if how == "gradient":
        drawn = SampledInputs(base, adapters)
        every = {key: torch.arange(shape[1]) for key, shape in base.layer_shapes.items()}
        return fuse_by_gradient(adapters, weights, [drawn(adapter, every) for adapter in adapters], base.device)
    if how == "constrained":
        texts = [word_states(base, adapter) for adapter in adapters]
        return merge_constrained(adapters, weights, texts, prior_states(base, adapters))
    if how == "fuse":
        return fuse(adapters, weights, SampledInputs(base, adapters))
    if adapters[0].dense:
        return weighted_sum(adapters, weights, base.layers, how)
    return sum_adapters(adapters, weights, "sum")


@torch.no_grad()
def word_states(base: Base, adapter: Adapter) -> Tensor:
    """(n, d): the text encoders' states at the concept's own words, in the prompts of its training."""
    with applied(base, [adapter]):
        ids = base.tokenize(own_prompts(adapter))
        states = base.encode_text(ids).states
    own = base.family.split(base.pipeline, ids)[0]
    return states[own >= base.pipeline.text_encoder.config.vocab_size].cpu()


@torch.no_grad()
def prior_states(base: Base, adapters: Sequence[Adapter]) -> Tensor:
    """(d, d): E[c cᵀ] of the text encoders' states of the prior prompts."""
    states = base.encode_text(base.tokenize(prior_prompts(adapters))).states.flatten(0, 1).double().cpu()
    return states.T @ states / len(states)
