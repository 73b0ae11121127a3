"""Trainings and evaluations started in a real browser, and the studio's benchmark."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import bench_studio
import pytest
import torch
from bench_common import save
from bench_studio import type_number

from sbora_diffusion.adapters.file import Adapter, read_spec
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.data.concept import default_roots
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.recipes.config import other_recipes

from .visitor import choose, field, generate, open_tab, select

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.timeout(900)


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_train_stop_resume_and_generate(page: "Page", here: Path, tiny_folder: Path) -> None:
    open_tab(page, "Train")
    images = sorted((default_roots()[1] / "tiger" / "images").iterdir())[:3]
    page.locator("#images input[type=file]").set_input_files(images)
    page.wait_for_function("document.querySelector('#captions textarea').value.split('\\n').length === 3")
    field(page, "name").fill("stripes")
    field(page, "noun").fill("tiger")
    field(page, "captions").click()
    page.wait_for_function("document.querySelector('#captions textarea').value.startsWith('a <stripes>')")
    field(page, "captions").fill("a <stripes> one\na <stripes> two\na <stripes> three")
    page.locator("#train-more button").first.click()
    choose(page, "train-base", str(tiny_folder))
    type_number(field(page, "train-steps"), 120)
    page.locator("#start").click()
    page.locator("#status [data-state=running]").wait_for()
    page.reload()  # a job does not depend on its page
    open_tab(page, "Train")
    page.get_by_text("of 120").wait_for()
    wait_until((here / "runs/stripes/checkpoint.pt").exists)
    page.locator("#stop").click()
    page.locator("#status [data-state=stopped]").wait_for()
    page.locator("#resume").click()
    page.locator("#status [data-state=done]").wait_for(timeout=600_000)
    page.locator("#preview img").wait_for()
    page.locator("#loss canvas, #loss svg").first.wait_for()
    assert read_spec(here / "adapters/stripes.safetensors").tokens == {"<stripes>": "tiger"}
    toml = (here / "concepts/stripes/concept.toml").read_text()
    assert [f'"a <stripes> {word}"' in toml for word in ("one", "two", "three")] == [True] * 3
    open_tab(page, "Generate")
    page.locator("#generate-more button").first.click()
    choose(page, "generate-base", str(tiny_folder))
    page.wait_for_function("document.querySelector('#generate-steps input[type=number]').value === '50'")
    assert page.locator("#generate-guidance input[type=number]").input_value() == "7.5"
    select(page, "concepts", "stripes")
    field(page, "prompt").fill("a <stripes>")
    generate(page, 1)


def test_another_recipe(page: "Page", here: Path) -> None:
    name = other_recipes("emoji64", "sbora-fa")[0]
    open_tab(page, "Train")
    choose(page, "source", "tiger")
    page.locator("#source-images img").nth(4).wait_for()  # an open list would not follow what they push down
    page.locator("#train-more button").first.click()
    choose(page, "recipe", name)
    choose(page, "method", "lora")
    page.wait_for_function("document.querySelector('#recipe input').value === 'default'")  # lora has no other
    choose(page, "method", "sbora-fa")
    choose(page, "recipe", name)
    page.locator("#start").click()
    page.locator("#status [data-state=running]").wait_for()
    page.locator("#stop").click()
    page.locator("#status [data-state=stopped]").wait_for()
    (job,) = (job for job in json.loads((here / "runs/studio.json").read_bytes()) if job["name"] == "tiger")
    assert job["arguments"][-2:] == ["--set", f"recipe={name}"]
    assert configure("emoji64", "sbora-fa", {"recipe": name}) != configure("emoji64", "sbora-fa", {})


def test_evaluate_stop_and_resume(page: "Page", here: Path) -> None:
    """A concept, single and merged: both are in the table, the scatter plot and the images."""
    dog, cat = (Adapter.load(here / f"adapters/{name}.safetensors") for name in ("dog", "cat"))
    merge([dog, cat], [1.0, 1.0], "sum").save(here / "adapters/both.safetensors")
    folder = here / "evaluations/dog-in-both-x1"
    open_tab(page, "Evaluate")
    select(page, "evaluate-concepts", "dog")
    choose(page, "evaluate-merged", "both")
    page.locator("#seeds").get_by_label("1", exact=True).check()
    page.locator("#evaluate").click()
    page.locator("#evaluate-status").get_by_text("Preparing …").wait_for()
    wait_until((folder / "evaluation.json").exists)
    page.locator("#evaluate-stop").click()
    page.locator("#evaluate-status").get_by_text("Stopped.").wait_for()
    page.locator("#evaluate-stop").wait_for(state="hidden")
    assert not (folder / "report.json").exists()
    for model in ("single", "merged"):  # all images but one need not be generated
        (folder / f"images/{model}/dog").mkdir(parents=True, exist_ok=True)
        for number in range(20):
            shutil.copyfile(default_roots()[1] / "dog/images/1.png", folder / f"images/{model}/dog/{number:03d}-0.png")
    (folder / "images/merged/dog/019-0.png").unlink()
    page.locator("#evaluate").click()
    page.get_by_text("Done.").wait_for(timeout=600_000)
    for model in ("single", "merged"):
        page.locator("#scores").get_by_text(model, exact=True).filter(visible=True).first.wait_for()
    page.locator("#scatter canvas, #scatter svg").first.wait_for()
    page.locator("#evaluate-images img").nth(1).wait_for()
    assert (folder / "images/merged/dog/019-0.png").exists()
    assert (folder / "report.json").exists()


def test_benchmark(page: "Page", address: str, here: Path, tmp_path: Path) -> None:
    rows = bench_studio.time_switching(bench_studio.save_concepts(here / "adapters" / "more"), 1)
    rows += bench_studio.time_page(page, address, here, 1, tiny=True)
    save("studio", torch.device("cpu"), rows, tmp_path / "studio.json", rounds=1, tiny=True, wall=True)
    result = json.loads((tmp_path / "studio.json").read_text())
    assert result["machine"]["clock"] == "wall"
    assert [row["beside"] for row in result["rows"]] == ["nothing"] * 8 + ["a training"] * 3
    assert all(row["ms"] > 0 for row in result["rows"])
