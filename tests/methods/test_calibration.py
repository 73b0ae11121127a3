"""Moments against inputs that were kept, and what fuse is given."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.fuse import fuse
from sbora_diffusion.data.latents import recorded_inputs
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.methods.calibration import PRIOR_PROMPTS, SampledInputs, own_prompts
from sbora_diffusion.models.base import Base

from ..evaluation.conftest import make_adapter


@pytest.fixture
def adapters(base: Base) -> list[Adapter]:
    return [make_adapter(base, name, 4 * number) for number, name in enumerate(("dog", "cat"))]


def test_moments_are_those_of_the_concepts_own_model(base: Base, adapters: list[Adapter]) -> None:
    dog = adapters[0]
    columns = {key: torch.tensor([0, 2, 5]) for key in dog.factors}
    sampled = SampledInputs(base, adapters, steps=2, seeds=1)
    found = sampled(dog, columns)
    seen: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in base.layers.values()}
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: seen[module].append(inputs[0].flatten(0, -2)))
        for layer in base.layers.values()
    ]
    with applied(base, [dog]):
        sampled._sample(own_prompts(dog))
    for hook in hooks:
        hook.remove()
    for key, moments in found.items():
        x = torch.cat(seen[base.layers[key]]).double()[:, [0, 2, 5]]
        torch.testing.assert_close(moments, (x.T @ x) / len(x), rtol=1e-9, atol=1e-12)
    assert found.keys() == columns.keys()


def test_fused_from_drawn_inputs(base: Base, adapters: list[Adapter]) -> None:
    before = {key: layer.weight.clone() for key, layer in base.layers.items()}
    inputs = SampledInputs(base, adapters, steps=1, seeds=1)
    one, other = fuse(adapters, [1, 1], inputs), fuse(adapters[::-1], [1, 1], inputs)
    assert one.to_bytes() == other.to_bytes()
    assert all(torch.equal(layer.weight, before[key]) for key, layer in base.layers.items())


def test_prompts_name_the_tokens(adapters: list[Adapter]) -> None:
    assert all("<dog>" in prompt for prompt in own_prompts(adapters[0]))
    assert own_prompts(adapters[0])


@pytest.mark.parametrize("recipe", [{"prior_prompts": [], "preview_prompts": [1, 2], "guidance": None}, {}])
def test_recipes_that_say_nothing(base: Base, adapters: list[Adapter], recipe: dict[str, Any]) -> None:
    silent = [replace(adapter, spec=replace(adapter.spec, recipe=recipe)) for adapter in adapters]
    nameless = replace(silent[0], spec=replace(silent[0].spec, tokens={}), tokens={})
    assert own_prompts(nameless) == list(PRIOR_PROMPTS)
    fused = fuse([nameless, silent[1]], [1, 1], SampledInputs(base, [nameless, silent[1]], steps=1, seeds=1))
    assert all(factor.weight.isfinite().all() for factor in fused.factors.values())


def test_no_recorder_stays(base: Base) -> None:
    with pytest.raises(RuntimeError, match="here"), recorded_inputs(base, dict.fromkeys(base.layers)):
        raise RuntimeError("here")
    assert not any(layer._forward_pre_hooks for layer in base.layers.values())
