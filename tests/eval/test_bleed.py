"""The bleed measurement end to end on a tiny base model, and its figures on scores made by hand."""

import json
from dataclasses import replace
from pathlib import Path

import bleed
import pytest
import torch
from PIL import Image

from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.evaluation.images import reference_images
from sbora_diffusion.evaluation.judges import clip
from sbora_diffusion.models.base import load_base

from ..inference.test_bake import concept
from ..tiny_clip import save_tiny_clip
from ..tiny_pipeline import save_tiny_pipeline

NAMES = ["dog", "penguin"]


@pytest.fixture
def studio(tmp_path: Path) -> bleed.Studio:
    base = load_base(str(save_tiny_pipeline(tmp_path / "tiny")))
    adapters = {}
    for name, interval in zip(NAMES, ("0:4", "4:8"), strict=True):
        adapter = concept(base, name, "fa", interval)
        recipe = {"preview_prompts": ["a {token}"], "prior_prompts": ["b"]}
        adapters[name] = replace(adapter, spec=replace(adapter.spec, recipe=recipe))
    references = reference_images([load_concept(name, default_roots()) for name in NAMES])
    judge = clip.load(str(save_tiny_clip(tmp_path / "clip"))).prepare(references)
    return bleed.Studio(base, judge, adapters, [0, 1], steps=2)


def test_every_pair_is_computed_once(studio: bleed.Studio, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    bleed.run(tmp_path / "pairs", NAMES, 2, lambda: studio, out)
    summary = json.loads(out.read_bytes())
    assert [row["condition"] for row in summary["rows"]] == list(bleed.CONDITIONS)
    assert (summary["pairs"], summary["images a condition"]) == (1, 8)
    scores = json.loads((tmp_path / "pairs" / "dog+penguin.json").read_bytes())
    assert all(torch.tensor(cell["scores"]).shape == (4, 2, 2, 2) for cell in scores.values())
    assert len({json.dumps(cell["scores"]) for cell in scores.values()}) == len(bleed.CONDITIONS)
    assert (tmp_path / "pairs" / "dog+penguin.png").exists()
    against = {row["condition"]: row["both first, against sum"]["mean"] for row in summary["rows"]}
    mean = {row["condition"]: row["both first"]["mean"] for row in summary["rows"]}
    assert against == pytest.approx({name: mean[name] - mean["sum"] for name in bleed.CONDITIONS}, abs=2e-4)
    with Image.open(out.with_suffix(".png")) as page, Image.open(tmp_path / "pairs" / "dog+penguin.png") as whole:
        assert page.height == whole.height
        assert page.crop((6, 38, 102, 134)).tobytes() == whole.crop((6, 38, 102, 134)).tobytes()
    assert out.with_suffix(".md").read_text().count("\n") == 2 + len(bleed.CONDITIONS)

    def refuse() -> bleed.Studio:
        raise AssertionError("a pair was computed again")

    bleed.run(tmp_path / "pairs", NAMES, 2, refuse, out)


def test_figures() -> None:
    """Asked for and swapped places; a half that resembles a third concept; one that resembles the other one."""
    scores = [
        [[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]],  # dog left, cat right, as asked
        [[0.1, 0.9, 0.0], [0.8, 0.2, 0.0]],  # the other way round
        [[0.6, 0.1, 0.7], [0.2, 0.8, 0.0]],  # the dog is rather an owl
        [[0.9, 0.1, 0.0], [0.8, 0.6, 0.7]],  # the cat is a second dog
    ]
    cell = {"names": [["dog", "cat"]], "scores": [scores]}
    found = bleed._figures(cell, ["dog", "cat", "owl"])
    expected = {
        "both first": [1, 1, 0, 0],
        "first": [1, 1, 0.5, 0.5],
        "rank": [1, 1, 1.5, 2],
        "own": [0.85, 0.85, 0.7, 0.75],
        "other": [0.15, 0.15, 0.15, 0.45],
        "as asked": [1, 0, 1, 1],
    }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], torch.tensor([values], dtype=torch.float32))


def test_prompts_of_regions() -> None:
    scene = bleed.Scene(names=("dog", "tux"), nouns=("dog", "penguin"), place="at sea")
    assert scene.prompt() == "a dog and a penguin at sea"
    assert scene.prompt(0, 1) == "a <dog> and a <tux> at sea"
    prompts = ["a <dog> and a penguin at sea", "a dog and a <tux> at sea"]
    assert [region.prompt for region in scene.regions()] == prompts
    assert [region.prompt for region in scene.regions(one_subject=True)] == ["a <dog> at sea", "a <tux> at sea"]


def test_the_first_pairs_include_every_concept() -> None:
    pairs = bleed.pairs_of(["a", "b", "c", "d"])
    assert pairs[:3] == [("a", "b"), ("b", "c"), ("c", "d")]
    assert len(set(pairs)) == len(pairs) == 6
