"""Settings of a training that meet: each pair that once ended a training, and what is asked of the model at once."""

from pathlib import Path

import pytest
import torch

from sbora_diffusion.data import latents
from sbora_diffusion.data.batches import BatchSampler, prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.distributed import SINGLE_PROCESS
from sbora_diffusion.models.tokens import class_embedding

from ..helpers import INTERVAL, short_config, train

TOGETHER = {
    "buckets, no prior": {"buckets": "1", "prior_batch": "0"},
    "buckets, no prior, text encoder alone": {"buckets": "1", "prior_batch": "0", "text_encoder_learning_rate": "0"},
    "buckets, attention, class": {"buckets": "1", "attention_weight": "0.1", "class_images": "3"},
    "attention, no prior, masks": {"attention_weight": "0.1", "prior_batch": "0", "masked_loss": "1"},
    "attention, checkpointing": {"attention_weight": "0.1", "gradient_checkpointing": "1"},
    "all": {"attention_weight": "0.1", "gradient_checkpointing": "1", "buckets": "1", "class_images": "3"},
}


@pytest.mark.parametrize("name", TOGETHER)
def test_settings_go_together(name: str, base: Base, tall: Concept, tmp_path: Path) -> None:
    done = train(tall, base, INTERVAL, short_config(**TOGETHER[name]), tmp_path / "run")
    assert done.adapter.spec.metrics["loss"] > 0
    assert not base.pipeline.unet.is_gradient_checkpointing
    assert "Recorder" not in str(base.pipeline.unet.attn_processors)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_token_alone_waits_where_all_captions_are_dropped(
    base: Base, concept: Concept, tmp_path: Path, precision: str
) -> None:
    config = short_config("textual-inversion", caption_dropout="1", precision=precision)
    before = class_embedding(base, concept.class_noun, config.method.token_vectors)
    done = train(concept, base, None, config, tmp_path / "run")
    for key, rows in done.adapter.tokens.items():
        assert torch.equal(rows, before[key.split(".")[0]])


def test_the_class_is_held_in_place_in_its_own_shape(base: Base, tall: Concept) -> None:
    config = short_config(buckets="1")
    data = prepare_data(tall, base, config)
    wide, square = (tuple(prior.noisy.shape[2:]) for prior in data.prior)
    assert wide[0] < wide[1]
    assert square[0] == square[1]
    said = base.tokenizer(base.learners[0]).batch_decode(data.prior[0].ids, skip_special_tokens=True)
    assert all("dog" in caption for caption in said)
    samples, generator = BatchSampler(data, base, config, SINGLE_PROCESS), torch.Generator().manual_seed(0)
    assert {tuple(samples.prior_batch(generator).noisy.shape[2:]) for _ in range(20)} == {wide, square}


def test_many_images_are_asked_about_in_parts(base: Base, tall: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    config = short_config(class_images="20", validation_images="1", validation_every="1")
    whole = prepare_data(tall, base, config)
    monkeypatch.setattr(latents, "MAX_BATCH_ELEMENTS", 1)
    rows: list[int] = []
    hook = base.denoiser.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    parts = prepare_data(tall, base, config)
    hook.remove()
    assert max(rows) == 2 * 8  # with and without the prompt
    assert whole.class_images
    assert parts.class_images
    torch.testing.assert_close(parts.class_images.latents, whole.class_images.latents, rtol=1e-3, atol=1e-4)
    assert [len(part.t) for part in BatchSampler(parts, base, config, SINGLE_PROCESS).held_out()] == [8] * 4
