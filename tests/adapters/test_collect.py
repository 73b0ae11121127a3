"""collect takes an adapter out of a live model: scale folded in, nothing shared with the model."""

import pytest
import torch

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.layer import attach, collect
from sbora_diffusion.utils.errors import SboraError

from .tiny import Tiny, inject, perturb


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_collect_folds_the_scale(tiny: Tiny, side: Side) -> None:
    model = inject("clip", tiny.load("clip"), "dog", rank=4, alpha=12)
    layers = attach(model, "dog", side, Interval(0, 4), 0)
    perturb(layer.trained for layer in layers.values())
    factors = collect(model, "dog", "text_encoder")
    assert factors.keys() == {f"text_encoder.{name}" for name in layers}
    for name, layer in layers.items():
        factor = factors[f"text_encoder.{name}"]
        assert torch.equal(factor.weight, layer.trained.detach() * 3)
        assert torch.equal(factor.index, layer.index)
        assert not factor.weight.requires_grad
        assert factor.weight.data_ptr() != layer.trained.data_ptr()


def test_collected_numbers_do_not_change_with_the_model(tiny: Tiny) -> None:
    model = inject("clip", tiny.load("clip"), "dog", rank=4, alpha=4)
    layers = attach(model, "dog", "fa", Interval(0, 4), 0)
    factors = collect(model, "dog", "text_encoder")
    perturb(layer.trained for layer in layers.values())
    assert all(factor.weight.count_nonzero() == 0 for factor in factors.values())


def test_nothing_to_collect(tiny: Tiny) -> None:
    model = inject("clip", tiny.load("clip"), "dense", init_lora_weights=False)
    for name in ("dense", "other"):
        with pytest.raises(SboraError, match=f"adapter '{name}' of the text_encoder has no layer"):
            collect(model, name, "text_encoder")
