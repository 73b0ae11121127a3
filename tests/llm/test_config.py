"""Settings and recipes of fine-tunings: recipes load, values are checked, docs are complete."""

import json
from pathlib import Path

import pytest

from sbora_diffusion.llm.config import LlmConfig, recipes
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
