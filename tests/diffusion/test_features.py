"""What each setting of a training does, and that a training with any of them is resumed bit for bit."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sbora_diffusion.adapter.basis import Interval
from sbora_diffusion.diffusion import latents
from sbora_diffusion.diffusion.attention_loss import AttentionLoss
from sbora_diffusion.diffusion.averages import Averages
from sbora_diffusion.diffusion.base import Base
from sbora_diffusion.diffusion.buckets import bucket_of
from sbora_diffusion.diffusion.captions import names_a_side, shuffle_tags
from sbora_diffusion.diffusion.concept import Concept, Picture
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.families.noising import Diffusion
from sbora_diffusion.diffusion.latents import encode
from sbora_diffusion.diffusion.live import live_concept
from sbora_diffusion.diffusion.masks import load_mask
from sbora_diffusion.diffusion.optimizers import PACKAGES
from sbora_diffusion.diffusion.processes import ALONE
from sbora_diffusion.diffusion.run import Run, mean_error
from sbora_diffusion.diffusion.samples import Sample, Samples, prepare_data
from sbora_diffusion.diffusion.schedules import rate_factor
from sbora_diffusion.diffusion.tokens import class_embedding
from sbora_diffusion.diffusion.train import StepLog, train
from sbora_diffusion.errors import SboraError

from .conftest import short_config
from .test_train import assert_same, result

INTERVAL = Interval(4, 4)
SETTINGS = {
    "accumulation": {"accumulation": "2"},
    "attention": {"attention_weight": "0.1"},
    "bf16": {"precision": "bf16"},
    "buckets": {"buckets": "1"},
    "class pictures": {"class_pictures": "3"},
    "constant": {"scheduler": "constant"},
    "cosine": {"scheduler": "cosine"},
    "ema": {"ema": "0.9"},
    "flip": {"flip": "1"},
    "checkpointing": {"gradient_checkpointing": "1"},
    "masks": {"masked_loss": "1"},
    "min-snr": {"min_snr_gamma": "5"},
    "noise offset": {"noise_offset": "0.5"},
    "prodigy": {"optimizer": "prodigy", "scheduler": "constant"},
    "schedule-free": {"optimizer": "schedule-free", "scheduler": "constant"},
    "tags": {"shuffle_tags": "1"},
    "validation": {"validation_pictures": "1", "validation_every": "2", "keep": "best"},
    "weight decay": {"weight_decay": "0.5"},
}
NO_EFFECT = ("checkpointing",)  # on what is learned, up to rounding


@pytest.fixture
def tall(tmp_path: Path) -> Concept:
    """Four pictures: three wide ones, of which two are transparent around their subject, and a high one."""
    pictures = []
    for number, size in enumerate(((60, 40), (64, 40), (60, 40), (40, 70))):
        image = Image.new("RGBA" if number < 2 else "RGB", size, (0, 0, 0, 0) if number < 2 else "white")
        ImageDraw.Draw(image).ellipse(
            (4, 6, size[0] // 2, size[1] - 9), fill=("red", "orange", "blue", "green")[number]
        )
        image.save(tmp_path / f"{number}.png")
        pictures.append(Picture(path=tmp_path / f"{number}.png", caption=f"a <rex>, in place {number}, at night, wet"))
    return Concept(name="rex", token="<rex>", class_noun="dog", pictures=tuple(pictures))


@pytest.fixture
def plain(tall: Concept, base: Base, tmp_path: Path) -> list[StepLog]:
    return list(train(tall, base, INTERVAL, short_config(), tmp_path / "plain"))


def distance(one: list[StepLog], other: list[StepLog]) -> float:
    pairs = [(factor.weight, result(other).factors[key].weight) for key, factor in result(one).factors.items()]
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_matters_and_is_resumed_bit_for_bit(
    name: str, base: Base, tall: Concept, plain: list[StepLog], tmp_path: Path
) -> None:
    config = short_config(**SETTINGS[name])
    straight = list(train(tall, base, INTERVAL, config, tmp_path / "straight"))
    assert (distance(straight, plain) > 1e-6) == (name not in NO_EFFECT)
    stopped = train(tall, base, INTERVAL, config, tmp_path / "run")
    for _ in range(3):
        next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    resumed = list(train(tall, base, INTERVAL, config, tmp_path / "run", resume=True))
    assert resumed[0].step == 3
    assert_same(result(resumed), result(straight))
    assert "_Watched" not in str(base.pipeline.unet.attn_processors)  # nothing is left of what looked on


TOGETHER = {
    "buckets, no prior": {"buckets": "1", "prior_batch": "0"},
    "buckets, no prior, text encoder alone": {"buckets": "1", "prior_batch": "0", "text_encoder_learning_rate": "0"},
    "buckets, attention, class": {"buckets": "1", "attention_weight": "0.1", "class_pictures": "3"},
    "attention, no prior, masks": {"attention_weight": "0.1", "prior_batch": "0", "masked_loss": "1"},
    "attention, checkpointing": {"attention_weight": "0.1", "gradient_checkpointing": "1"},
    "all": {"attention_weight": "0.1", "gradient_checkpointing": "1", "buckets": "1", "class_pictures": "3"},
}


@pytest.mark.parametrize("name", TOGETHER)
def test_settings_go_together(name: str, base: Base, tall: Concept, tmp_path: Path) -> None:
    logs = list(train(tall, base, INTERVAL, short_config(**TOGETHER[name]), tmp_path / "run"))
    assert result(logs).spec.metrics["loss"] > 0
    assert not base.pipeline.unet.is_gradient_checkpointing
    assert "Watched" not in str(base.pipeline.unet.attn_processors)


def test_attention_is_watched_in_the_samples_pass_alone(
    base: Base, tall: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    observe = AttentionLoss.observe
    monkeypatch.setattr(
        AttentionLoss, "observe", lambda loss, *watched: (seen.append(len(watched[1])), observe(loss, *watched))
    )
    config = short_config(attention_weight="0.1", class_pictures="3", batch_size="2", prior_batch="3")
    run_of(base, tall, config)
    cross = [key for key in base.pipeline.unet.attn_processors if "attn2" in key]
    assert seen == [2 + 3] * len(cross)


@pytest.mark.parametrize("more", [{}, {"buckets": "1", "class_pictures": "3"}])
def test_checkpointing_watches_the_attention_too(base: Base, tall: Concept, more: dict[str, str]) -> None:
    learned = [
        run_of(base, tall, short_config(attention_weight="10", gradient_checkpointing=switch, **more))[1]
        for switch in ("0", "1")
    ]
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_token_alone_waits_where_all_captions_are_dropped(
    base: Base, concept: Concept, tmp_path: Path, precision: str
) -> None:
    config = short_config("textual-inversion", caption_dropout="1", precision=precision)
    before = class_embedding(base, concept.class_noun, config.token_vectors)
    logs = list(train(concept, base, None, config, tmp_path / "run"))
    for key, rows in result(logs).tokens.items():
        assert torch.equal(rows, before[key.split(".")[0]])


def test_the_class_is_held_in_place_in_its_own_shape(base: Base, tall: Concept) -> None:
    config = short_config(buckets="1")
    data = prepare_data(tall, base, config)
    wide, square = (tuple(prior.noisy.shape[2:]) for prior in data.prior)
    assert wide[0] < wide[1]
    assert square[0] == square[1]
    said = base.tokenizer(base.learners[0]).batch_decode(data.prior[0].ids, skip_special_tokens=True)
    assert all("dog" in caption for caption in said)
    samples, generator = Samples(data, base, config, ALONE), torch.Generator().manual_seed(0)
    assert {tuple(samples.of_prior(generator).noisy.shape[2:]) for _ in range(20)} == {wide, square}


def test_many_pictures_are_asked_about_in_parts(base: Base, tall: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    config = short_config(class_pictures="20", validation_pictures="1", validation_every="1")
    whole = prepare_data(tall, base, config)
    monkeypatch.setattr(latents, "AT_ONCE", 1)
    rows: list[int] = []
    hook = base.denoiser.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    parts = prepare_data(tall, base, config)
    hook.remove()
    assert max(rows) == 2 * 8  # with and without the prompt
    assert whole.of_class
    assert parts.of_class
    torch.testing.assert_close(parts.of_class.latents, whole.of_class.latents, rtol=1e-3, atol=1e-4)
    assert [len(part.t) for part in Samples(parts, base, config, ALONE).held_out()] == [8] * 4


def test_other_masks_are_another_training(base: Base, tall: Concept, tmp_path: Path) -> None:
    config, file = short_config(masked_loss="1"), tall.pictures[2].path.with_suffix(".mask.png")
    Image.new("L", (60, 40), 255).save(file)
    stopped = train(tall, base, INTERVAL, config, tmp_path / "run")
    for _ in range(3):
        next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    next(train(tall, base, INTERVAL, config, tmp_path / "run", resume=True))
    Image.new("L", (60, 40), 200).save(file)
    with pytest.raises(SboraError, match="differs in masks"):
        next(train(tall, base, INTERVAL, config, tmp_path / "run", resume=True))


def run_of(base: Base, concept: Concept, config: TrainConfig, steps: int = 1) -> tuple[Run, list[Tensor]]:
    """A training after some steps, and its gradients."""
    data = prepare_data(concept, base, config)
    with live_concept(concept, base, INTERVAL, config) as live:
        run = Run(live, data, config, base)
        for step in range(steps):
            run.advance(step)
        return run, [p.grad.clone() for p in live.parameters() if p.grad is not None]


@pytest.mark.parametrize("optimizer", ["schedule-free", "prodigy"])
def test_a_look_at_the_result_changes_nothing(base: Base, concept: Concept, optimizer: str) -> None:
    pytest.importorskip({"schedule-free": "schedulefree", "prodigy": "prodigyopt"}[optimizer])
    config = short_config(optimizer=optimizer, scheduler="constant")
    data = prepare_data(concept, base, config)
    with live_concept(concept, base, INTERVAL, config) as live:
        run = Run(live, data, config, base)
        for step in range(3):
            run.advance(step)
        before = [parameter.detach().clone() for parameter in live.parameters()]
        with run.at_rest():
            pass
        assert all(map(torch.equal, before, live.parameters()))


def test_accumulation_is_the_mean_over_its_batches(base: Base, concept: Concept) -> None:
    settings = {"max_grad_norm": "1e9", "quiet_weight": "0", "prior_batch": "0"}
    together = run_of(base, concept, short_config(accumulation="3", **settings))[1]
    apart = []
    for number in range(3):
        config = short_config(**settings)
        data = prepare_data(concept, base, config)
        with live_concept(concept, base, INTERVAL, config) as live:
            Run(live, data, config, base).advance(number)
            apart.append([p.grad.clone() for p in live.parameters() if p.grad is not None])
    for mean, parts in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(mean, sum(parts) / 3, rtol=1e-4, atol=1e-7)


def test_checkpointing_keeps_less_and_learns_the_same(base: Base, concept: Concept) -> None:
    def kept_bytes(switch: str) -> tuple[int, list[Tensor]]:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, gradients = run_of(base, concept, short_config(gradient_checkpointing=switch))
        return sum(seen.values()), gradients

    (much, expected), (little, got) = kept_bytes("0"), kept_bytes("1")
    assert little < 0.8 * much
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_half_precision_keeps_what_is_learned_in_fp32(base: Base, tall: Concept, tmp_path: Path) -> None:
    for precision in ("bf16", "fp16"):
        logs = list(train(tall, base, INTERVAL, short_config(precision=precision), tmp_path / precision))
        weights = [factor.weight for factor in result(logs).factors.values()]
        assert {weight.dtype for weight in weights} == {torch.float32}
        assert any((weight != weight.to(torch.bfloat16).float()).any() for weight in weights)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_papers(base: Base, kind: str) -> None:
    base.pipeline.scheduler.register_to_config(prediction_type=kind)
    t = torch.tensor([0, 100, 500, 999])
    kept = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)[t]
    snr = kept / (1 - kept)
    clamped = torch.minimum(snr, torch.tensor(5.0))
    expected = clamped / snr if kind == "epsilon" else clamped / (snr + 1)
    torch.testing.assert_close(
        Diffusion(base.pipeline).min_snr_weights(t, 5.0).double(), expected, rtol=1e-3, atol=1e-6
    )


def test_a_schedule_goes_where_it_should() -> None:
    for name, middle, last in (("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0)):
        config = short_config(steps="1000", warmup_steps="10", final_rate="0.1", scheduler=name)
        assert rate_factor(0, config) == pytest.approx(0.1, rel=0.01)
        assert rate_factor(500, config) == pytest.approx(middle, rel=0.01)
        assert rate_factor(999, config) == pytest.approx(last, rel=0.02)


def test_averages_change_places_and_come_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    averages = Averages([parameter], decay=0.5)
    expected = 0.0
    for step in range(1, 4):
        with torch.no_grad():
            parameter.fill_(step)
        averages.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with averages.in_place():
        torch.testing.assert_close(parameter.detach(), torch.full((2,), expected))
    assert torch.equal(parameter.detach(), torch.full((2,), 3.0))


def test_masks_are_cut_as_their_pictures_are(base: Base, concept: Concept) -> None:
    for picture in concept.pictures:  # 40 x 60: the square that the model sees begins 10 pixels from the top
        mask = Image.new("L", (40, 60), 255)
        mask.paste(0, (0, 0, 40, 30))
        mask.save(picture.path.with_suffix(".mask.png"))
    [shots] = encode(base, concept.pictures, short_config(masked_loss="1", crops="1", smallest_crop="1"))
    assert shots.masks is not None
    assert shots.masks.shape == (2, 1, *shots.latents.shape[-2:])
    half = shots.masks.shape[-2] // 2
    assert shots.masks[:, :, : half - 1].max() == 0
    assert shots.masks[:, :, half + 1 :].min() == 1


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
    with pytest.raises(SboraError, match=r"has \(41, 40\) pixels, its picture \(40, 40\)"):
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


def test_masks_of_pictures_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    [shots] = encode(base, concept.pictures, short_config(masked_loss="1"))
    assert shots.masks is None
    assert "no picture has a mask" in caplog.text
    caplog.clear()
    assert encode(base, [], short_config(masked_loss="1")) == []  # nothing is held out
    assert not caplog.text


def test_pictures_keep_their_proportions(base: Base, tall: Concept) -> None:
    wide, square = (encode(base, tall.pictures, short_config(buckets=switch)) for switch in ("1", "0"))
    assert len(square) == 1
    shapes = {tuple(shots.latents.shape[-2:]): len(shots.captions) for shots in wide}
    assert sum(shapes.values()) == len(square[0].captions)
    assert any(height > width for height, width in shapes)
    assert any(height < width for height, width in shapes)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 100), (512, 512)), ((3000, 2000), (640, 448)), ((1, 9), (384, 704))]
)
def test_buckets(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert bucket_of(*size, 512) == expected
    assert abs(expected[0] * expected[1] / 512**2 - 1) < 0.12


def test_mirrored_unless_the_caption_names_a_side(base: Base, tall: Concept) -> None:
    [straight] = encode(base, tall.pictures[2:3], short_config(crops="1"))
    [flipped] = encode(base, tall.pictures[2:3], short_config(crops="1", flip="1"))
    assert not torch.equal(straight.latents, flipped.latents)
    sided = Picture(path=tall.pictures[2].path, caption="a <rex> on the left")
    [kept] = encode(base, [sided], short_config(crops="1", flip="1"))
    assert torch.equal(straight.latents, kept.latents)
    assert names_a_side("Leftmost <a>") > names_a_side("a <bright> leftover")


def test_tags_change_places_but_for_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    orders = {shuffle_tags("a <rex>, at night,wet, in snow", generator) for _ in range(60)}
    assert len(orders) == 6
    assert all(order.startswith("a <rex>, ") for order in orders)
    assert shuffle_tags("a <rex>", generator) == "a <rex>"


def test_attention_is_drawn_into_the_mask(base: Base, tall: Concept) -> None:
    """The regularisation falls when it is trained on."""
    values = []
    for weight in ("0.0001", "300"):
        config = short_config(attention_weight=weight, steps="25", learning_rate="3e-2", token_learning_rate="3e-2")
        data = prepare_data(tall, base, config)
        with live_concept(tall, base, INTERVAL, config) as live:
            run = Run(live, data, config, base)
            for step in range(25):
                run.advance(step)
            values.append(run._attention().item())  # type: ignore[misc]
    assert values[1] < values[0]


def test_attention_of_tokens_with_an_embedding_a_layer(base: Base, tall: Concept, tmp_path: Path) -> None:
    config = short_config("mix-of-show", rank="4")
    assert config.attention_weight > 0
    logs = list(train(tall, base, None, config, tmp_path / "run"))
    assert result(logs).spec.method == "mix-of-show"


def test_text_encoder_at_rate_zero_is_left_alone(base: Base, concept: Concept, tmp_path: Path) -> None:
    logs = list(train(concept, base, INTERVAL, short_config(text_encoder_learning_rate="0"), tmp_path / "run"))
    assert {key.split(".")[0] for key in result(logs).factors} == {"unet"}


def test_validation_is_told_and_the_best_is_kept(base: Base, tall: Concept, tmp_path: Path) -> None:
    config = short_config(validation_pictures="1", validation_every="2", keep="best")
    logs = list(train(tall, base, INTERVAL, config, tmp_path / "run"))
    told = {log.step: log.validation for log in logs[:-1] if log.validation is not None}
    assert sorted(told) == [2, 4, 6]
    best = result(logs).spec.metrics
    assert told[int(best["best_step"])] == min(told.values()) == pytest.approx(best["validation_loss"])
    with pytest.raises(SboraError, match="of 4 pictures: none is left"):
        list(train(tall, base, INTERVAL, short_config(validation_pictures="4"), tmp_path / "other"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "choose from adamw, adamw-8bit"),
        ({"ema": "1"}, "below 1"),
        ({"ema": "0.9", "optimizer": "schedule-free"}, "averages the weights itself"),
        ({"buckets": "1", "erasure_weight": "1", "quiet_weight": "0"}, "pictures of one shape"),
        ({"flip": "2"}, "from 0 to 1"),
        ({"method": "textual-inversion", "token_learning_rate": "0"}, "would learn nothing"),
        ({"prior_prompts": ""}, "prior prompts, of which there are none"),
        ({"masked_loss": "2"}, "expected 0 or 1"),
        ({"validation_pictures": "1", "validation_every": "0"}, "never asked"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SboraError, match=message):
        short_config(**settings)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_optimiser_is_told(
    name: str, base: Base, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [key for key in sys.modules if key.split(".")[0] == PACKAGES[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(SboraError, match=f"needs the package {PACKAGES[name]}"):
        list(train(concept, base, INTERVAL, short_config(optimizer=name), tmp_path / "run"))


def test_eight_bits_need_a_gpu(base: Base, concept: Concept, tmp_path: Path) -> None:
    if base.device.type == "cuda":
        list(train(concept, base, INTERVAL, short_config(optimizer="adamw-8bit"), tmp_path / "run"))
    else:
        with pytest.raises(SboraError, match="needs a GPU"):
            list(train(concept, base, INTERVAL, short_config(optimizer="adamw-8bit"), tmp_path / "run"))


def test_gradients_that_are_not_finite_are_named(base: Base, concept: Concept) -> None:
    config = short_config()
    data = prepare_data(concept, base, config)
    with live_concept(concept, base, INTERVAL, config) as live:
        live.trained["text_encoder"][0].register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(SboraError, match="the gradients of the text_encoder are not finite at step 1"):
            Run(live, data, config, base).advance(0)
