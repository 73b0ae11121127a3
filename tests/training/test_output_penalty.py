"""OutputPenalty against responses computed the long way, and what its weight does in a training."""

import pytest
import torch
from torch import nn

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.latents import recorded_inputs
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.models.base import Base
from sbora_diffusion.training.losses.base import OutputPenalty
from sbora_diffusion.training.trainer import Trainer

from ..helpers import short_config

INTERVAL = Interval(4, 4)


def ask(base: Base) -> None:
    """Two prompts, one noisy image each, in two calls."""
    ids, size = base.tokenize(["a dog", "a red cat at sea"]), base.pipeline.unet.config.sample_size
    noisy = torch.randn(
        2, base.pipeline.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        for number in range(2):
            base.predict(noisy[[number]], torch.tensor([500]), base.encode_text(ids[[number]]))


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
def test_loudness_is_the_mean_relative_response(base: Base, concept: Concept, method: str) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    by_layer: dict[nn.Module, list[torch.Tensor]] = {
        layer: seen.setdefault(key, []) for key, layer in base.layers.items()
    }
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: by_layer[module].append(inputs[0]))
        for layer in base.layers.values()
    ]
    with recorded_inputs(base, dict.fromkeys(base.layers)) as moments:
        ask(base)
    for hook in hooks:
        hook.remove()
    weights = {key: layer.weight.clone() for key, layer in base.layers.items()}
    with injected_concept(concept, base, INTERVAL, short_config(method)) as live:
        loudness = OutputPenalty(base, live.layers, moments.means())
        assert loudness() == 0
        shares = []
        for component, layers in live.layers.items():
            for name, layer in layers.items():
                nn.init.normal_(layer.trained)
                key = f"{component}.{name}"
                x = torch.cat([inputs.flatten(0, -2) for inputs in seen[key]])
                delta = torch.zeros_like(weights[key])
                delta[(slice(None), layer.index) if method == "sbora-fa" else layer.index] = layer.delta().detach()
                shares.append((x @ delta.T).pow(2).sum() / (x @ weights[key].T).pow(2).sum())
        torch.testing.assert_close(loudness().detach(), torch.stack(shares).mean(), rtol=1e-4, atol=0)


def test_its_weight_keeps_the_adapter_quiet(base: Base, concept: Concept) -> None:
    found, moments = [], prepare_data(concept, base, short_config(output_penalty="1")).moments
    for weight in ("0", "100"):
        config = short_config(output_penalty=weight, prior_batch="0")
        data = prepare_data(concept, base, config)
        with injected_concept(concept, base, INTERVAL, config) as live:
            run = Trainer(live, data, config, base)
            for step in range(config.optim.steps):
                run.train_step(step)
            found.append(OutputPenalty(base, live.layers, moments)().item())
    assert found[1] < 0.8 * found[0]


def test_recorded_is_what_is_to_be_quiet(base: Base, concept: Concept) -> None:
    assert prepare_data(concept, base, short_config(output_penalty="0")).moments == {}
    config = short_config(output_penalty="1", blocks="up_blocks")
    quiet = [f"{part}.{name}" for part, names in base.adapted_layers(["up_blocks"]).items() for name in names]
    assert sorted(prepare_data(concept, base, config).moments) == sorted(quiet)
