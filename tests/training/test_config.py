"""Recipes and settings: every shipped recipe loads, every value arrives, every mistake is named."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from sbora_diffusion.methods.registry import configure, method_names
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.recipes.schema import flatten, settings_of
from sbora_diffusion.utils.errors import SboraError

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
DEFAULTS = flatten(TrainConfig, tomllib.loads((files("sbora_diffusion") / "recipes" / "default.toml").read_text()))
RECIPES = sorted(f.name for f in (files("sbora_diffusion") / "recipes").iterdir() if f.name.endswith(".toml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads(recipe: str) -> None:
    base_id, _, rest = recipe.removesuffix(".toml").partition("-")
    method = next(
        (method for method in method_names() if rest.startswith(method)), "lora"
    )  # else of a base, by any method
    named = rest.removeprefix(method).removeprefix("-")
    assert configure(base_id, method, {"recipe": named} if named else {}).method.name == method


@pytest.mark.parametrize("method", method_names())
def test_an_unknown_base_gets_the_default_recipe(method: str) -> None:
    assert configure("sd", method, {}) == configure("default", method, {})


def test_overrides_arrive_with_their_types() -> None:
    overrides = {"steps": "7", "learning_rate": "1e-4", "preview_prompts": "a {token}; two {token}"}
    config = configure("emoji64", "sbora-fb", overrides)
    assert (config.optim.steps, config.optim.learning_rate) == (7, 1e-4)
    assert config.output.preview_prompts == ("a {token}", "two {token}")
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_the_default_shows_a_concept_at_its_best_and_sum_safe_sums() -> None:
    default = configure("emoji64", "sbora-fa", {"steps": "7"})
    safe = configure("emoji64", "sbora-fa", {"recipe": "sum-safe", "steps": "7"})
    assert default.loss.output_penalty < safe.loss.output_penalty
    assert default.optim.learning_rate > safe.optim.learning_rate
    assert (safe.optim.steps, safe.method.blocks) == (7, default.method.blocks)
    measured = {"output_penalty": "2", "learning_rate": "1.2e-2", "text_encoder_learning_rate": "3e-3", "steps": "7"}
    measured |= {"batch_size": "8", "prior_batch": "2", "recipe": "sum-safe"}
    assert default == configure("emoji64", "sbora-fa", measured)  # docs/comparison.md
    with pytest.raises(SboraError, match="got recipe=quiet; sbora-fa on emoji64 has sum-safe"):
        configure("emoji64", "sbora-fa", {"recipe": "quiet"})
    with pytest.raises(SboraError, match="lora on emoji64 has no other recipe"):
        configure("emoji64", "lora", {"recipe": "loud"})


@pytest.mark.parametrize("base", ["emoji64", "sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
def test_every_family_has_both_recipes(base: str, method: str) -> None:
    default, safe = configure(base, method, {}), configure(base, method, {"recipe": "sum-safe"})
    assert default.optim.learning_rate == 2 * safe.optim.learning_rate
    assert default.optim.text_encoder_learning_rate == 2 * safe.optim.text_encoder_learning_rate
    assert default.loss.output_penalty < safe.loss.output_penalty / 30
    assert configure(base, method, {"recipe": "loud"}) == default  # its name in older commands and plans


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stesp", "7", "unknown setting 'stesp'"),
        ("steps", "many", "expected a whole number"),
        ("steps", "0", "steps=0"),
        ("learning_rate", "nan", "learning_rate=nan"),
        ("caption_dropout", "1.5", "from 0 to 1"),
        ("smallest_crop", "0", "greater than 0"),
        ("method", "lore", "unknown method 'lore'"),
        ("preview_prompts", "a {toke}", "preview_prompts"),
    ],
)
def test_mistakes_are_named(key: str, value: str, message: str) -> None:
    with pytest.raises(SboraError, match=message):
        configure("emoji64", "sbora-fa", {key: value})


@pytest.mark.parametrize(
    ("key", "value", "guessed"), [("stesp", "7", "steps"), ("method", "orthogonl", "orthogonal"), ("zzz", "1", "")]
)
def test_what_was_meant_is_guessed(key: str, value: str, guessed: str) -> None:
    with pytest.raises(SboraError) as caught:
        configure("emoji64", "sbora-fa", {key: value})
    assert str(caught.value.hint).startswith(f"did you mean {guessed}? choose from" if guessed else "choose from")


def test_a_recipe_without_a_key_is_refused() -> None:
    settings = configure("emoji64", "sbora-fa", {}).to_dict()
    del settings["rank"]
    with pytest.raises(SboraError, match="lacks \\['rank'\\]"):
        TrainConfig.from_dict(settings)


@pytest.mark.parametrize("key", settings_of(TrainConfig))
def test_every_setting_is_documented_in_its_group_with_its_default(key: str) -> None:
    group = settings_of(TrainConfig)[key].group
    section = DOCS.read_text().split(f"### {group or 'No group'}")[1].split("\n#")[0]
    [(default, meaning)] = re.findall(rf"^\| `{key}` \| (.+?) \| (.+) \|$", section, re.MULTILINE)
    assert meaning
    value = DEFAULTS.get(key, "sbora-fa")  # recipes do not name the method
    if not isinstance(value, list):
        assert default == (f"{value:g}" if type(value) is float else str(value).replace("False", "false"))
