"""What each setting of a training does, and that a training with any of them is resumed bit for bit."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept, ConceptImage
from sbora_diffusion.data.images import bucket_of, names_a_side, shuffle_tags
from sbora_diffusion.data.latents import encode
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.families.base import Diffusion
from sbora_diffusion.training.checkpoint import StepLog
from sbora_diffusion.training.optim import EMA, PACKAGES, learning_rate_factor
from sbora_diffusion.training.run import run_training
from sbora_diffusion.training.trainer import Trainer
from sbora_diffusion.utils.errors import SboraError

from ..helpers import INTERVAL, Trained, save_tall_concept, short_config, train, trainer_after
from .test_train import assert_same

SETTINGS = {
    "accumulation": {"accumulation": "2"},
    "attention": {"attention_weight": "0.1"},
    "bf16": {"precision": "bf16"},
    "buckets": {"buckets": "1"},
    "class images": {"class_images": "3"},
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
    "validation": {"validation_images": "1", "validation_every": "2", "keep": "best"},
    "weight decay": {"weight_decay": "0.5"},
}
FOUR_STEPS = short_config(steps="4")
NO_EFFECT = ("checkpointing",)  # on what is learned, up to rounding


@pytest.fixture(scope="module")
def plain(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("plain")
    return train(save_tall_concept(folder), load_base(str(tiny_folder)), INTERVAL, FOUR_STEPS, folder / "run")


def distance(one: Trained, other: Trained) -> float:
    pairs = [(factor.weight, other.adapter.factors[key].weight) for key, factor in one.adapter.factors.items()]
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_matters_and_is_resumed_bit_for_bit(
    name: str, base: Base, tall: Concept, plain: Trained, tmp_path: Path
) -> None:
    config = short_config(**SETTINGS[name], steps="4")
    logs: list[StepLog] = []

    def copy_after_three(entry: StepLog) -> None:
        logs.append(entry)
        if entry.step == 3:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    result = run_training(tall, base, INTERVAL, config, tmp_path / "run", on_step=copy_after_three)
    straight = Trained(logs, result)
    assert (distance(straight, plain) > 1e-6) == (name not in NO_EFFECT)
    resumed = train(tall, base, INTERVAL, config, tmp_path / "killed", resume=True)
    assert resumed.logs[0].step == 3
    assert_same(resumed.adapter, straight.adapter)
    assert "_Recorder" not in str(base.pipeline.unet.attn_processors)  # nothing is left of what looked on


@pytest.mark.parametrize("optimizer", ["schedule-free", "prodigy"])
def test_a_look_at_the_result_changes_nothing(base: Base, concept: Concept, optimizer: str) -> None:
    pytest.importorskip({"schedule-free": "schedulefree", "prodigy": "prodigyopt"}[optimizer])
    config = short_config(optimizer=optimizer, scheduler="constant")
    data = prepare_data(concept, base, config)
    with injected_concept(concept, base, INTERVAL, config) as live:
        run = Trainer(live, data, config, base)
        for step in range(3):
            run.train_step(step)
        before = [parameter.detach().clone() for parameter in live.parameters()]
        with run.eval_parameters():
            pass
        assert all(map(torch.equal, before, live.parameters()))


def test_accumulation_is_the_mean_over_its_batches(base: Base, concept: Concept) -> None:
    settings = {"max_grad_norm": "1e9", "output_penalty": "0", "prior_batch": "0"}
    together = trainer_after(base, concept, short_config(accumulation="3", **settings))[1]
    apart = []
    for number in range(3):
        config = short_config(**settings)
        data = prepare_data(concept, base, config)
        with injected_concept(concept, base, INTERVAL, config) as live:
            Trainer(live, data, config, base).train_step(number)
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
            _, gradients = trainer_after(base, concept, short_config(gradient_checkpointing=switch))
        return sum(seen.values()), gradients

    (much, expected), (little, got) = kept_bytes("0"), kept_bytes("1")
    assert little < 0.8 * much
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_half_precision_keeps_what_is_learned_in_fp32(base: Base, tall: Concept, tmp_path: Path) -> None:
    for precision in ("bf16", "fp16"):
        done = train(tall, base, INTERVAL, short_config(precision=precision), tmp_path / precision)
        weights = [factor.weight for factor in done.adapter.factors.values()]
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
        config = short_config(steps="1000", warmup_steps="10", final_learning_rate="0.1", scheduler=name)
        assert learning_rate_factor(0, config) == pytest.approx(0.1, rel=0.01)
        assert learning_rate_factor(500, config) == pytest.approx(middle, rel=0.01)
        assert learning_rate_factor(999, config) == pytest.approx(last, rel=0.02)


def test_averages_change_places_and_come_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    averages = EMA([parameter], decay=0.5)
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


def test_images_keep_their_proportions(base: Base, tall: Concept) -> None:
    wide, square = (encode(base, tall.images, short_config(buckets=switch)) for switch in ("1", "0"))
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
    [straight] = encode(base, tall.images[2:3], short_config(crops="1"))
    [flipped] = encode(base, tall.images[2:3], short_config(crops="1", flip="1"))
    assert not torch.equal(straight.latents, flipped.latents)
    sided = ConceptImage(path=tall.images[2].path, caption="a <rex> on the left")
    [kept] = encode(base, [sided], short_config(crops="1", flip="1"))
    assert torch.equal(straight.latents, kept.latents)
    assert names_a_side("Leftmost <a>") > names_a_side("a <bright> leftover")


def test_tags_change_places_but_for_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    orders = {shuffle_tags("a <rex>, at night,wet, in snow", generator) for _ in range(60)}
    assert len(orders) == 6
    assert all(order.startswith("a <rex>, ") for order in orders)
    assert shuffle_tags("a <rex>", generator) == "a <rex>"


def test_text_encoder_at_rate_zero_is_left_alone(base: Base, concept: Concept, tmp_path: Path) -> None:
    done = train(concept, base, INTERVAL, short_config(text_encoder_learning_rate="0"), tmp_path / "run")
    assert {key.split(".")[0] for key in done.adapter.factors} == {"unet"}


def test_validation_is_told_and_the_best_is_kept(base: Base, tall: Concept, tmp_path: Path) -> None:
    config = short_config(validation_images="1", validation_every="2", keep="best")
    done = train(tall, base, INTERVAL, config, tmp_path / "run")
    told = {log.step: log.validation for log in done.logs if log.validation is not None}
    assert sorted(told) == [2, 4, 6]
    best = done.adapter.spec.metrics
    assert told[int(best["best_step"])] == min(told.values()) == pytest.approx(best["validation_loss"])
    with pytest.raises(SboraError, match="of 4 images: none is left"):
        train(tall, base, INTERVAL, short_config(validation_images="4"), tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "choose from adamw, adamw-8bit"),
        ({"ema": "1"}, "below 1"),
        ({"ema": "0.9", "optimizer": "schedule-free"}, "averages the weights itself"),
        ({"buckets": "1", "erasure_weight": "1", "output_penalty": "0"}, "images of one shape"),
        ({"flip": "2"}, "from 0 to 1"),
        ({"method": "textual-inversion", "token_learning_rate": "0"}, "would learn nothing"),
        ({"prior_prompts": ""}, "prior prompts, of which there are none"),
        ({"masked_loss": "2"}, "expected true or false"),
        ({"validation_images": "1", "validation_every": "0"}, "never be used"),
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
        train(concept, base, INTERVAL, short_config(optimizer=name), tmp_path / "run")


def test_eight_bits_need_a_gpu(base: Base, concept: Concept, tmp_path: Path) -> None:
    if base.device.type == "cuda":
        train(concept, base, INTERVAL, short_config(optimizer="adamw-8bit"), tmp_path / "run")
    else:
        with pytest.raises(SboraError, match="needs a GPU"):
            train(concept, base, INTERVAL, short_config(optimizer="adamw-8bit"), tmp_path / "run")


def test_gradients_that_are_not_finite_are_named(base: Base, concept: Concept) -> None:
    config = short_config()
    data = prepare_data(concept, base, config)
    with injected_concept(concept, base, INTERVAL, config) as live:
        live.trained["text_encoder"][0].register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(SboraError, match="the gradients of the text_encoder are not finite at step 1"):
            Trainer(live, data, config, base).train_step(0)
