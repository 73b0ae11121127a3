"""Files written before settings and keys got their current names: they load, merge, generate and resume."""

import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.data.concept import Concept, load_concept
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import CHECKPOINT, read_log
from sbora_diffusion.training.run import run_training

GOLDENS = Path(__file__).parent / "goldens" / "before_rooms"
OLD_KEYS = {"quiet_weight", "final_rate", "class_pictures", "validation_pictures", "pictures", "picture"}


@pytest.fixture
def tiny(base: Base) -> Base:
    """The base model that the files were made for: a CPU may round its random weights differently."""
    base = replace(base, id="tiny")
    vars(base)["fingerprint"] = "6d090444e05ad6e2"
    return base


@pytest.fixture
def mug() -> Concept:
    return load_concept("mug", [GOLDENS])


@pytest.mark.parametrize(
    ("name", "method", "penalty", "images"), [("sbora", "sbora-fa", 0.5, 1), ("lora", "lora", 0, 0)]
)
def test_concept_file_loads_with_current_names(name: str, method: str, penalty: float, images: int) -> None:
    adapter = Adapter.load(GOLDENS / f"{name}.safetensors")
    recipe = dict(adapter.spec.recipe)
    assert (adapter.spec.method_name, adapter.spec.tokens) == (method, {"<mug>": "mug"})
    assert not OLD_KEYS & recipe.keys()
    assert recipe.pop("images") == "1fcfa5d616562018"
    config = TrainConfig.from_dict(recipe)
    assert (config.method.rank, config.method.name, config.optim.final_learning_rate) == (2, method, 0.25)
    assert (config.loss.output_penalty, config.data.class_images, config.data.validation_images) == (
        penalty,
        images,
        images,
    )
    assert config.loss.masked_loss is False
    assert Adapter.load(GOLDENS / f"{name}.safetensors").to_bytes() == adapter.to_bytes()


@pytest.mark.parametrize("name", ["sbora", "lora"])
def test_concept_generates(tiny: Base, name: str) -> None:
    def image() -> list[bytes]:
        return [one.tobytes() for one in generate(tiny, ["a <mug>"], seeds=[0], steps=1)]

    adapter = Adapter.load(GOLDENS / f"{name}.safetensors")
    with applied(tiny, [adapter], [0.0]):
        without = image()
    with applied(tiny, [adapter], [5000.0]):
        assert image() != without


def test_concepts_merge() -> None:
    adapter = Adapter.load(GOLDENS / "sbora.safetensors")
    other = replace(adapter, spec=replace(adapter.spec, name="other", tokens={"<other>": "mug"}), tokens={})
    merged = merge([adapter, other], [1.0, 1.0], "sum")
    for key, factor in adapter.factors.items():
        assert torch.equal(merged.factors[key].index, factor.index.sort().values)
        assert torch.equal(merged.factors[key].weight, 2 * factor.weight[:, factor.index.argsort()])


@pytest.mark.parametrize("folder", ["finished", "interrupted"])
def test_run_folder_is_read_with_current_names(folder: str) -> None:
    config = TrainConfig.from_dict(json.loads((GOLDENS / folder / "run.json").read_text())["config"])
    assert config.optim.final_learning_rate == 0.25
    log = read_log(GOLDENS / folder)
    assert not any(OLD_KEYS & entry.keys() for entry in log)
    assert [entry["image"] for entry in log] == ([None, "before-after.png"] if folder == "finished" else [None])


def test_interrupted_training_resumes(tiny: Base, mug: Concept, tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "interrupted", tmp_path / "run")
    (tmp_path / "run" / CHECKPOINT).write_bytes(lzma.decompress((tmp_path / "run" / f"{CHECKPOINT}.xz").read_bytes()))
    config = TrainConfig.from_dict(json.loads((tmp_path / "run" / "run.json").read_text())["config"])
    resumed = _resume(mug, tiny, Interval(2, 2), config, tmp_path / "run")
    straight = Adapter.load(GOLDENS / "sbora.safetensors")
    assert resumed.spec.recipe == straight.spec.recipe
    for key, factor in straight.factors.items():
        assert torch.equal(resumed.factors[key].index, factor.index)
        torch.testing.assert_close(resumed.factors[key].weight, factor.weight, rtol=1e-3, atol=1e-5)
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def _resume(concept: Concept, base: Base, interval: Interval, config: TrainConfig, folder: Path) -> Adapter:
    return run_training(concept, base, interval, config, folder, resume=True).adapter
