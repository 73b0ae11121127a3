"""Settings and recipes of fine-tunings: recipes load, values are checked, docs are complete."""

import json
from pathlib import Path

import pytest

from sbora_diffusion.llm.config import LlmConfig, recipes
from sbora_diffusion.llm.train import training_arguments
from sbora_diffusion.recipes.schema import settings_of
from sbora_diffusion.utils.errors import SboraError

DOCS = Path(__file__).parents[2] / "docs" / "llm.md"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": "0"}, "got rank=0"),
        ({"color": "red"}, "unknown setting 'color'"),
        ({"template": "poem"}, "got template=poem, choose from"),
        ({"rank": "many"}, "expected a whole number"),
        ({"dropout": "1"}, "got dropout=1.0, expected a number from 0 to below 1"),
        ({"epochs": "0"}, "got steps=0 and epochs=0"),
        ({"targets": ";"}, "got no targets"),
        ({"train_on_inputs": "maybe"}, "got train_on_inputs=maybe, expected true or false"),
        ({"steps": "-3"}, "got steps=-3, expected a number from 0 on"),
        ({"optimizer": "foo"}, "got optimizer=foo, choose from adamw_torch, "),
    ],
)
def test_invalid_settings_are_rejected(setting: dict[str, str], message: str) -> None:
    with pytest.raises(SboraError, match=message):
        LlmConfig.from_recipe("commonsense", setting)


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_are_loaded_and_described(recipe: str) -> None:
    config = LlmConfig.from_recipe(recipe, {"train_on_inputs": "false", "targets": "q_proj; v_proj"})
    assert (config.data.train_on_inputs, config.method.targets) == (False, ("q_proj", "v_proj"))
    assert LlmConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("key", settings_of(LlmConfig))
def test_every_setting_is_documented(key: str) -> None:
    assert f"| `{key}` | {settings_of(LlmConfig)[key].help}" in DOCS.read_text()


def test_recipes_reach_the_trainer(tmp_path: Path) -> None:
    published = {
        "commonsense": (1, -1, 2e-4, 16, 1, 100, "linear", 1.0, "random"),
        "arithmetic": (3, -1, 3e-4, 8, 1, 100, "linear", 1.0, "random"),
        "qsbora": (1, 10_000, 2e-4, 16, 4, 0, "constant", 0.3, "group_by_length"),
        "small": (1, -1, 1e-3, 8, 1, 5, "linear", 1.0, "random"),
    }
    assert set(recipes()) == set(published)
    for recipe in published:
        got = training_arguments(LlmConfig.from_recipe(recipe, {"dtype": "float32"}), tmp_path)
        schedule = got.num_train_epochs, got.max_steps, got.learning_rate, got.per_device_train_batch_size
        rest = (
            got.gradient_accumulation_steps,
            got.warmup_steps,
            str(getattr(got.lr_scheduler_type, "value", got.lr_scheduler_type)),
            got.max_grad_norm,
        )
        assert (*schedule, *rest, got.train_sampling_strategy) == published[recipe]


def test_paged_optimiser_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlmConfig.from_recipe("qsbora", {"dtype": "float32"})
    assert training_arguments(config, tmp_path).optim == "adamw_torch"
    seen = {}
    monkeypatch.setattr("sbora_diffusion.llm.train.TrainingArguments", lambda **given: seen.update(given))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    training_arguments(config, tmp_path)
    assert seen["optim"] == "paged_adamw_32bit"
    assert not seen["use_cpu"]
