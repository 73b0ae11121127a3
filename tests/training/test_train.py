"""Training: resumed bit for bit, repeatable, nothing left behind in the base model, and what may go wrong."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval, indices
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.latents import Batch
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.families.base import TextConditioning
from sbora_diffusion.models.tokens import class_embedding
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import CHECKPOINT, StepLog
from sbora_diffusion.training.optim import learning_rate_factor
from sbora_diffusion.training.train import run_training
from sbora_diffusion.training.trainer import Trainer
from sbora_diffusion.utils.errors import SboraError

from ..helpers import Trained, save_concept, short_config, train, train_until

INTERVAL = Interval(4, 4)


def assert_same(one: Adapter, other: Adapter) -> None:
    assert one.factors.keys() == other.factors.keys()
    for key, factor in one.factors.items():
        assert torch.equal(factor.index, other.factors[key].index)
        assert torch.equal(factor.weight, other.factors[key].weight)
    assert one.tokens.keys() == other.tokens.keys()
    assert all(torch.equal(one.tokens[key], other.tokens[key]) for key in one.tokens)


def snapshot(base: Base) -> dict[str, Tensor]:
    modules = nn.ModuleDict({name: base.component(name) for name in base.adapted})
    return {key: value.clone() for key, value in modules.state_dict().items()}


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
def test_result_owns_its_interval_and_was_trained(base: Base, concept: Concept, tmp_path: Path, method: str) -> None:
    config = short_config(method)
    done = train(concept, base, INTERVAL, config, tmp_path / "run")
    adapter = done.adapter
    assert [log.step for log in done.logs] == [1, 2, 3, 4, 5, 6]
    assert adapter.factors.keys() == base.layers.keys()
    for key, factor in adapter.factors.items():
        dim = base.layer_shapes[key][1 if method == "sbora-fa" else 0]
        assert torch.equal(factor.index, indices(key.split(".", 1)[1], dim, INTERVAL, config.method.basis_seed))
        assert factor.weight.abs().sum() > 0
    start = class_embedding(base, concept.class_noun, config.method.token_vectors)["text_encoder"]
    assert adapter.tokens["text_encoder.<rex>"].shape == start.shape
    assert not torch.equal(adapter.tokens["text_encoder.<rex>"], start)
    assert adapter.spec.tokens == {"<rex>": "dog"}
    assert adapter.spec.base_fingerprint == base.fingerprint
    assert done.result.before_after.stat().st_size > 1000


def test_the_base_model_is_as_it_was(base: Base, concept: Concept, config: TrainConfig, tmp_path: Path) -> None:
    before = snapshot(base)
    train(concept, base, INTERVAL, config, tmp_path / "run")
    after = snapshot(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "<rex>" not in base.pipeline.tokenizer.get_vocab()


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training of the `config` fixture that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return train(save_concept(folder), load_base(str(tiny_folder)), INTERVAL, short_config(), folder / "run")


@pytest.mark.parametrize("stop", [3, 5])
def test_resume_is_bitwise_identical(
    base: Base, concept: Concept, config: TrainConfig, tmp_path: Path, stop: int, whole: Trained
) -> None:
    before = snapshot(base)
    train_until(stop, concept, base, INTERVAL, config, tmp_path / "run")
    assert all(torch.equal(value, before[key]) for key, value in snapshot(base).items())

    resumed = train(concept, base, INTERVAL, config, tmp_path / "run", resume=True)
    assert resumed.logs[0].step == stop // 2 * 2 + 1  # from the checkpoint after every second step
    assert_same(resumed.adapter, whole.adapter)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_same_seed_same_adapter_other_seed_another(
    base: Base, concept: Concept, tmp_path: Path, whole: Trained
) -> None:
    again, other = (
        train(concept, base, INTERVAL, short_config(seed=seed), tmp_path / seed).adapter for seed in ("0", "2")
    )
    first = whole.adapter
    assert_same(first, again)
    key = next(iter(first.factors))
    assert not torch.equal(first.factors[key].weight, other.factors[key].weight)


def test_it_learns(base: Base, concept: Concept, tmp_path: Path) -> None:
    """At the same noise, the loss falls below that of a training whose learning rates are almost 0."""
    totals = []
    for scale in (1e-2, 1e-12):
        rates = {f"{part}learning_rate": str(scale) for part in ("", "text_encoder_", "token_")}
        config = short_config(steps="30", prior_batch="0", caption_dropout="0", **rates)
        done = train(concept, base, INTERVAL, config, tmp_path / str(scale))
        totals.append(sum(log.loss for log in done.logs[15:30]))
    assert totals[0] < 0.97 * totals[1]


def test_the_prior_holds_the_class_in_place(base: Base, concept: Concept, tmp_path: Path) -> None:
    drifts = []
    for weight in ("0", "30"):
        config = short_config(steps="15", learning_rate="4e-2", prior_weight=weight, prior_batch="4")
        adapter = train(concept, base, INTERVAL, config, tmp_path / weight).adapter
        drifts.append(adapter.spec.metrics["class_drift"])
    assert drifts[1] < drifts[0]


def test_an_interrupted_training_is_not_overwritten(
    base: Base, concept: Concept, config: TrainConfig, tmp_path: Path
) -> None:
    train_until(3, concept, base, INTERVAL, config, tmp_path)
    with pytest.raises(SboraError, match="interrupted training") as caught:
        train(concept, base, INTERVAL, config, tmp_path)
    assert "--resume" in (caught.value.hint or "")
    with pytest.raises(SboraError, match=r"differs in config\.seed \(0 there, 5 here\), interval"):
        train(concept, base, Interval(8, 4), short_config(seed="5"), tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"two\nlines")
    with pytest.raises(SboraError, match="is damaged, or no checkpoint"):
        train(concept, base, INTERVAL, config, tmp_path, resume=True)


def test_one_folder_one_training(base: Base, concept: Concept, config: TrainConfig, tmp_path: Path) -> None:
    def start_another(_: StepLog) -> None:
        run_training(concept, base, INTERVAL, config, tmp_path)

    with pytest.raises(SboraError, match="another training is running"):
        run_training(concept, base, INTERVAL, config, tmp_path, on_step=start_another)


def test_the_result_is_saved_before_the_checkpoint_is_deleted(
    base: Base, concept: Concept, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = tmp_path / "run", tmp_path / "rex.safetensors"

    def fail(_: Adapter, *__: object, **___: object) -> None:
        raise SboraError("cannot write")

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "save", fail)
        with pytest.raises(SboraError, match="cannot write"):
            train(concept, base, INTERVAL, config, run, save_to=path)
    assert (run / CHECKPOINT).exists()
    done = train(concept, base, INTERVAL, config, run, save_to=path, resume=True)
    assert [entry.step for entry in done.logs] == [5, 6]
    assert not (run / CHECKPOINT).exists()
    assert done.result.path == path
    assert_same(Adapter.load(path), done.adapter)


def test_a_file_that_was_created_during_training_is_kept(
    base: Base, concept: Concept, config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rex.safetensors"
    options: dict[str, Any] = {"save_to": path, "on_step": lambda _: path.write_bytes(b"other")}
    result = run_training(concept, base, INTERVAL, config, tmp_path / "run", **options)
    assert path.read_bytes() == b"other"
    assert result.path == tmp_path / "run" / "rex.safetensors"
    assert f"{path} was created during training and was not overwritten; the result is in {result.path}" in caplog.text
    assert result.path
    assert_same(Adapter.load(result.path), result.adapter)
    replaced = run_training(concept, base, INTERVAL, config, tmp_path / "run", overwrite=True, **options)
    assert replaced.path == path
    assert_same(Adapter.load(path), replaced.adapter)


def test_a_loss_that_is_not_finite_stops_with_advice(
    base: Base, concept: Concept, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(base: Base, noisy: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        return base.pipeline.unet(noisy * float("nan"), t, text.states).sample

    monkeypatch.setattr(Base, "predict", broken)
    with pytest.raises(SboraError, match="the loss is nan at step 1") as caught:
        train(concept, base, INTERVAL, config, tmp_path)
    assert f"--set learning_rate={config.optim.learning_rate / 10:.0e}" in (caught.value.hint or "")


def test_a_step_that_fp16_skips_leaves_no_trace_in_the_result(
    base: Base, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, calls = Trainer._predict, count()

    def overflows_once(trainer: Trainer, batch: Batch) -> Tensor:
        return predict(trainer, batch) * (float("inf") if next(calls) == 0 else 1.0)

    monkeypatch.setattr(Trainer, "_predict", overflows_once)
    last = train(concept, base, INTERVAL, short_config(precision="fp16"), tmp_path)
    assert last.logs[0].loss != last.logs[0].loss
    assert 0 < last.adapter.spec.metrics["loss"] < 10
    last.adapter.save(tmp_path / "dog.safetensors")


def test_a_caption_that_hides_its_token_is_refused(base: Base, concept: Concept, tmp_path: Path) -> None:
    long = replace(concept.images[0], caption="a photo" + " of a place" * 60 + f" with {concept.token}")
    hidden = replace(concept, images=(long, *concept.images[1:]))
    with pytest.raises(SboraError, match=f"is too long: {concept.token} is beyond"):
        train(hidden, base, INTERVAL, short_config(), tmp_path)


def test_a_preview_that_hides_its_token_is_refused_at_once(base: Base, concept: Concept, tmp_path: Path) -> None:
    config = short_config(preview_prompts="a" + " long" * 90 + " {token}")
    with pytest.raises(SboraError, match=f"is too long: {concept.token} is beyond"):
        train(concept, base, INTERVAL, config, tmp_path)


def test_previews_come_in_between(base: Base, concept: Concept, tmp_path: Path) -> None:
    done = train(concept, base, INTERVAL, short_config(preview_every="2"), tmp_path)
    previews = [log.preview for log in done.logs if log.preview]
    assert [path.name for path in previews] == ["preview-000002.png", "preview-000004.png"]
    assert all(path.exists() for path in previews)


def test_scores_come_on_time_and_the_best_step_is_kept(base: Base, concept: Concept, tmp_path: Path) -> None:
    """Scores that fall after step 2: what is kept is what a training of two steps at the same rates has learned."""
    given = iter([0.5, 0.9, 0.1])
    config = short_config(eval_every="1", keep="best", steps="3", final_learning_rate="1")
    scored = train(concept, base, INTERVAL, config, tmp_path / "a", score=lambda: {"overall": next(given)})
    assert [log.scores for log in scored.logs] == [{"overall": 0.5}, {"overall": 0.9}, {"overall": 0.1}]
    assert scored.adapter.spec.metrics["best_step"] == 2
    two = short_config(steps="2", final_learning_rate="1")
    assert_same(scored.adapter, train(concept, base, INTERVAL, two, tmp_path / "b").adapter)


def test_the_best_step_survives_an_interruption(base: Base, concept: Concept, tmp_path: Path) -> None:
    config = short_config(eval_every="1", keep="best")
    given = {1: 0.3, 2: 0.9, 3: 0.1, 4: 0.2, 5: 0.3, 6: 0.4}
    steps = iter([1, 2, 3, 3, 4, 5, 6])  # stopped after step 3, resumed from the checkpoint of step 2

    def score() -> dict[str, float]:
        return {"overall": given[next(steps)]}

    train_until(3, concept, base, INTERVAL, config, tmp_path, score=score)
    resumed = train(concept, base, INTERVAL, config, tmp_path, resume=True, score=score).adapter
    assert (resumed.spec.metrics["best_step"], resumed.spec.metrics["overall"]) == (2, 0.9)


def test_the_best_step_needs_scores() -> None:
    with pytest.raises(SboraError, match="keep=best with eval_every=0"):
        short_config(keep="best")


def test_learning_rates_reach_their_parameters(base: Base, concept: Concept, tmp_path: Path) -> None:
    """A rate of zero leaves its part where it started, and only that part."""
    config = short_config(text_encoder_learning_rate="0", token_learning_rate="0")
    adapter = train(concept, base, INTERVAL, config, tmp_path).adapter
    assert torch.equal(
        adapter.tokens["text_encoder.<rex>"],
        class_embedding(base, concept.class_noun, config.method.token_vectors)["text_encoder"],
    )
    moved = dict.fromkeys(base.adapted, False)
    for key, factor in adapter.factors.items():
        moved[key.split(".")[0]] |= bool(factor.weight.abs().sum() > 0)
    assert moved == {"unet": True, "text_encoder": False}


def test_rate_factor_warms_up_and_decays() -> None:
    config = short_config(steps="100", warmup_steps="10", final_learning_rate="0.1")
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(factors[9])
    assert factors[-1] == pytest.approx(0.109)
