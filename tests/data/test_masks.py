"""Masks: where they come from, what is learned within them, and the attention that is drawn into them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sbora_diffusion.data.batches import Sample, prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.images import load_mask
from sbora_diffusion.data.latents import encode
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.models.base import Base
from sbora_diffusion.training.losses.attention import AttentionLoss
from sbora_diffusion.training.losses.base import mean_error
from sbora_diffusion.training.trainer import Trainer
from sbora_diffusion.utils.errors import SboraError

from ..helpers import INTERVAL, short_config, train, train_until, trainer_after


def test_masks_are_cut_as_their_images_are(base: Base, concept: Concept) -> None:
    for image in concept.images:  # 40 x 60: the square that the model sees begins 10 pixels from the top
        mask = Image.new("L", (40, 60), 255)
        mask.paste(0, (0, 0, 40, 30))
        mask.save(image.path.with_suffix(".mask.png"))
    [shots] = encode(base, concept.images, short_config(masked_loss="1", crops="1", smallest_crop="1"))
    assert shots.masks is not None
    assert shots.masks.shape == (2, 1, *shots.latents.shape[-2:])
    half = shots.masks.shape[-2] // 2
    assert shots.masks[:, :, : half - 1].max() == 0
    assert shots.masks[:, :, half + 1 :].min() == 1


@pytest.mark.parametrize(("left", "buckets", "empty"), [(0, "0", 2), (55, "0", 0), (0, "1", 0), (95, "0", 2)])
def test_a_subject_beside_every_crop_is_refused(
    base: Base, concept: Concept, left: int, buckets: str, empty: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The central square of a wide image is learned, without buckets."""
    for image in concept.images:
        mask = Image.new("L", (120, 60))
        mask.paste(255, (left, 10, left + 20, 50))
        Image.new("RGB", (120, 60), "red").save(image.path)
        mask.save(image.path.with_suffix(".mask.png"))
    config = short_config(masked_loss="1", crops="2", smallest_crop="1", buckets=buckets)
    if empty:
        with pytest.raises(SboraError, match=r"no crop of .*0\.png shows anything of its mask"):
            encode(base, concept.images, config)
    else:
        assert all(
            group.masks is not None and group.masks.amax((1, 2, 3)).min() > 0
            for group in encode(base, concept.images, config)
        )
    assert not caplog.records


def test_crops_without_the_subject_are_counted(base: Base, concept: Concept, caplog: pytest.LogCaptureFixture) -> None:
    mask = Image.new("L", (40, 60))
    mask.paste(255, (0, 28, 4, 32))
    mask.save(concept.images[0].path.with_suffix(".mask.png"))
    encode(base, concept.images[:1], short_config(masked_loss="1", crops="20", smallest_crop="0.3"))
    assert "of 20 crops of" in caplog.text


def test_an_error_behind_the_mask_is_none() -> None:
    target, masks = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    masks[..., :2] = 1
    answered = torch.zeros_like(target)
    answered[..., 2:] = 5
    weights = torch.tensor([1.0, 3.0])
    sample = Sample(target, torch.zeros(2), torch.zeros(2, 4), target, weights, masks)
    assert mean_error(answered, sample, masked=True) == 0
    assert mean_error(answered, sample, masked=False) == 25 / 2 * (1 + 3) / 2
    answered[..., :2] = 2
    assert mean_error(answered, sample, masked=True) == 4 * (1 + 3) / 2


def test_where_a_mask_comes_from(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 40), "red").save(folder / "a.jpg")
    assert load_mask(folder / "a.jpg") is None
    Image.new("RGBA", (40, 40), (9, 9, 9, 255)).save(folder / "b.png")
    assert load_mask(folder / "b.png") is None
    half = Image.new("RGBA", (40, 40), (9, 9, 9, 255))
    half.paste((0, 0, 0, 0), (0, 0, 20, 40))
    half.save(folder / "c.png")
    alpha = load_mask(folder / "c.png")
    assert alpha is not None
    assert (alpha.getpixel((3, 3)), alpha.getpixel((30, 3))) == (0, 255)
    (tmp_path / "masks").mkdir()
    Image.new("L", (40, 40), 200).save(tmp_path / "masks" / "a.png")
    found = load_mask(folder / "a.jpg")
    assert found is not None
    assert found.getpixel((0, 0)) == 200
    Image.new("L", (41, 40), 200).save(folder / "a.mask.png")
    with pytest.raises(SboraError, match=r"has \(41, 40\) pixels, its image \(40, 40\)"):
        load_mask(folder / "a.jpg")
    Image.new("L", (40, 40), 0).save(folder / "a.mask.png")
    with pytest.raises(SboraError, match="all black"):
        load_mask(folder / "a.jpg")
    painted = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 20, 40))
    deep = np.full((40, 40), 6000, np.uint16)
    deep[:, 20:] = 65535
    for mask, expected in ((painted, (255, 0)), (Image.fromarray(deep), (23, 255))):
        mask.save(folder / "a.mask.png")
        found = load_mask(folder / "a.jpg")
        assert found is not None
        assert (found.getpixel((3, 3)), found.getpixel((30, 3))) == expected


def test_masks_of_images_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 4), np.uint8)
    Image.fromarray(noise, "RGBA").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SboraError, match=r"a\.png is too large"):
        load_mask(tmp_path / "a.png")
    monkeypatch.undo()
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:9000])
    with pytest.raises(SboraError, match=r"cannot read .*a\.png"):
        load_mask(tmp_path / "a.png")


def test_without_any_mask_all_is_learned(base: Base, concept: Concept, caplog: pytest.LogCaptureFixture) -> None:
    [shots] = encode(base, concept.images, short_config(masked_loss="1"))
    assert shots.masks is None
    assert "no image has a mask" in caplog.text
    caplog.clear()
    assert encode(base, [], short_config(masked_loss="1")) == []  # nothing is held out
    assert not caplog.text


def test_other_masks_are_another_training(base: Base, tall: Concept, tmp_path: Path) -> None:
    config, file = short_config(masked_loss="1"), tall.images[2].path.with_suffix(".mask.png")
    Image.new("L", (60, 40), 255).save(file)
    train_until(3, tall, base, INTERVAL, config, tmp_path / "run")
    train_until(3, tall, base, INTERVAL, config, tmp_path / "run", resume=True)
    Image.new("L", (60, 40), 200).save(file)
    with pytest.raises(SboraError, match="differs in masks"):
        train(tall, base, INTERVAL, config, tmp_path / "run", resume=True)


def test_attention_is_drawn_into_the_mask(base: Base, tall: Concept) -> None:
    """The regularisation falls when it is trained on."""
    values = []
    for weight in ("0.0001", "300"):
        config = short_config(attention_weight=weight, steps="25", learning_rate="3e-2", token_learning_rate="3e-2")
        data = prepare_data(tall, base, config)
        with injected_concept(tall, base, INTERVAL, config) as live:
            trainer = Trainer(live, data, config, base)
            for step in range(25):
                trainer.train_step(step)
            loss = trainer._objectives[0].losses["attention"]
            assert isinstance(loss, AttentionLoss)
            values.append(loss().item())
    assert values[1] < values[0]


def test_attention_of_tokens_with_an_embedding_a_layer(base: Base, tall: Concept, tmp_path: Path) -> None:
    config = short_config("mix-of-show", rank="4")
    assert config.loss.attention_weight > 0
    done = train(tall, base, None, config, tmp_path / "run")
    assert done.adapter.spec.method == "mix-of-show"


def test_attention_is_watched_in_the_samples_pass_alone(
    base: Base, tall: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    observe = AttentionLoss.observe
    monkeypatch.setattr(
        AttentionLoss, "observe", lambda loss, *watched: (seen.append(len(watched[1])), observe(loss, *watched))
    )
    config = short_config(attention_weight="0.1", class_images="3", batch_size="2", prior_batch="3")
    trainer_after(base, tall, config)
    cross = [key for key in base.pipeline.unet.attn_processors if "attn2" in key]
    assert seen == [2 + 3] * len(cross)


@pytest.mark.parametrize("more", [{}, {"buckets": "1", "class_images": "3"}])
def test_checkpointing_watches_the_attention_too(base: Base, tall: Concept, more: dict[str, str]) -> None:
    learned = [
        trainer_after(base, tall, short_config(attention_weight="10", gradient_checkpointing=switch, **more))[1]
        for switch in ("0", "1")
    ]
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
