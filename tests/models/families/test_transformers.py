"""What SD3 and FLUX alone have: a T5 that is read once or missing, and things that they cannot do."""

import math
from pathlib import Path

import pytest
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.inference.gating import live_concepts
from sbora_diffusion.methods.live import injected
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.families.transformer import FLUX
from sbora_diffusion.models.layerwise_tokens import cross_attentions
from sbora_diffusion.utils.errors import SboraError

from ...tiny_transformers import save_tiny_flux, save_tiny_sd3
from .conftest import SETTINGS, last_of, make_concept


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(save_tiny_sd3(tmp_path_factory.mktemp("sd3") / "tiny")))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(save_tiny_flux(tmp_path_factory.mktemp("flux") / "tiny")))


@pytest.fixture
def concept(tmp_path: Path) -> Concept:
    return make_concept(tmp_path, "rex", "red")


def test_reading_is_the_pipelines(sd3: Base) -> None:
    text = sd3.encode_text(sd3.tokenize(["a dog", "a cat"]))
    states, _, pooled, _ = sd3.pipeline.encode_prompt(["a dog", "a cat"], None, None, do_classifier_free_guidance=False)
    assert text.pooled is not None
    torch.testing.assert_close(text.states, states)
    torch.testing.assert_close(text.pooled, pooled)


def test_reading_is_the_pipelines_in_flux_too(flux: Base) -> None:
    text = flux.encode_text(flux.tokenize(["a dog", "a cat"]))
    states, pooled, _ = flux.pipeline.encode_prompt(["a dog", "a cat"])
    assert text.pooled is not None
    torch.testing.assert_close(text.states, states)
    torch.testing.assert_close(text.pooled, pooled)


def test_t5_reads_a_caption_once(flux: Base) -> None:
    calls: list[int] = []
    hook = flux.pipeline.text_encoder_2.register_forward_hook(lambda *_: calls.append(1))
    ids = flux.tokenize(["a red fox", "a red fox", "a blue fox"])
    first, again = flux.encode_text(ids), flux.encode_text(ids)
    hook.remove()
    assert len(calls) == 2
    assert torch.equal(first.states, again.states)


def test_sd3_without_its_t5(concept: Concept, tmp_path: Path) -> None:
    base = load_base(str(save_tiny_sd3(tmp_path / "tiny")))
    base.pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    text = base.encode_text(base.tokenize(["a dog"]))
    states, *_ = base.pipeline.encode_prompt(["a dog"], None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(text.states, states)
    config = configure("sd3", "sbora-fa", SETTINGS | {"steps": "1"})
    assert last_of(concept, base, Interval(0, 4), config, tmp_path / "run").factors


def test_what_transformers_cannot_do(flux: Base) -> None:
    with pytest.raises(SboraError, match=r"regions and gating support Stable Diffusion 1.x, 2.x and XL"):
        live_concepts(flux, []).__enter__()
    with pytest.raises(SboraError, match=r"embeddings for each layer are for Stable Diffusion 1.x and 2.x"):
        cross_attentions(flux)
    config = configure("flux", "custom-diffusion", {})
    with pytest.raises(SboraError, match="trains a U-Net's cross-attention"), injected(flux, "rex", None, config):
        pass
    with pytest.raises(SboraError, match="takes no negative prompt"):
        flux.sample(["a dog"], seeds=[0], steps=1, guidance=1.0, negative_prompt="a cat")


def test_flux_is_trained_at_the_noise_levels_of_its_resolution(flux: Base) -> None:
    """1024 pixels are 4096 tokens, for which the shift is exp(1.15), the most that the scheduler knows."""
    levels = FLUX.noising(flux.pipeline).timesteps(10_001, torch.Generator().manual_seed(0)) / 1000
    shift = math.exp(1.15)
    assert float(levels.median()) == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-3)
