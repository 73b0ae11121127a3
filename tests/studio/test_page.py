"""Every tab used as a visitor would, in a real browser."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench_studio import type_number
from PIL import Image

from sbora_diffusion.adapters.file import Adapter, read_spec
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.data.concept import default_roots
from sbora_diffusion.inference.image_file import read_settings
from sbora_diffusion.methods.registry import configure

from .conftest import PHONE, needed

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _gradio() -> None:
    needed("gradio", find_spec("gradio"))


def tab(page: "Page", name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def field(page: "Page", name: str) -> "Locator":
    return page.locator(f"#{name} input, #{name} textarea").first


def switch_on(page: "Page", group: str, *names: str) -> None:
    for name in names:
        page.locator(f"#{group}").get_by_label(name, exact=True).check()


def choose(page: "Page", dropdown: str, option: str) -> None:
    page.locator(f"#{dropdown} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def fewer_steps(page: "Page") -> None:
    page.get_by_role("button", name="More").first.click()
    type_number(page.get_by_label("number input for Steps"), 2)


def drawn(page: "Page", number: int, note: str = "note") -> None:
    """All images are there; only the note tells, Gradio's word for screen readers is "In queue: 1 of 1"."""
    page.wait_for_function(f"document.querySelector('#{note}').innerText.startsWith('{number} of {number}')")


def said(page: "Page", name: str, value: str) -> None:
    """A field that may not be there yet has this value."""
    page.wait_for_function(f"document.querySelector('#{name} textarea, #{name} input')?.value === '{value}'")


def draw(page: "Page", number: int) -> None:
    page.locator("#count").get_by_label(str(number), exact=True).check()
    page.locator("#generate").click()
    drawn(page, number)


def test_generate_download_and_take_up_again(page: "Page", here: Path) -> None:
    switch_on(page, "concepts", "dog")
    field(page, "prompt").fill("a on the beach")
    field(page, "prompt").evaluate("area => area.setSelectionRange(1, 1)")
    page.get_by_role("button", name="<dog>", exact=True).click()
    said(page, "prompt", "a <dog> on the beach")
    type_number(page.get_by_label("number input for Strength of dog"), 0.5)
    fewer_steps(page)
    draw(page, 4)
    page.locator("#gallery img").first.click()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_label("Download").first.click()
    download.value.save_as(here / "downloaded.png")
    made = read_settings(here / "downloaded.png")
    assert (made.prompt, made.seed, made.steps, made.concepts) == ("a <dog> on the beach", 0, 2, {"dog": 0.5})
    files = sorted((here / "outputs").glob("*.png"))
    assert len(files) == 4
    assert files[0].read_bytes() == (here / "downloaded.png").read_bytes()
    assert [read_settings(file).seed for file in files] == [0, 1, 2, 3]

    page.reload()
    page.wait_for_selector("#concepts label")
    page.get_by_role("button", name="More").first.click()
    page.locator("#dropped input[type=file]").set_input_files(here / "downloaded.png")
    said(page, "prompt", "a <dog> on the beach")
    page.wait_for_selector("text=Strength of dog")
    assert page.get_by_label("number input for Strength of dog").input_value() == "0.5"
    draw(page, 1)
    again = sorted((here / "outputs").glob("*.png"))[-1]
    assert Image.open(again).tobytes() == Image.open(files[0]).tobytes()


def test_errors_say_what_to_do(page: "Page") -> None:
    field(page, "prompt").fill("a <cat> at night")
    page.locator("#generate").click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "The prompt says <cat>, but its concept is off. Switch on cat." in toast.inner_text()
    field(page, "prompt").fill("a <unicorn>")
    page.locator("#generate").click()
    page.get_by_text("Nobody has taught emoji64 the token <unicorn>", exact=False).wait_for(state="attached")
    assert "Traceback" not in page.content()


def test_keyboard_alone(page: "Page", here: Path) -> None:
    page.wait_for_selector("#concepts label")
    fewer_steps(page)
    field(page, "prompt").focus()
    page.keyboard.press("Tab")
    page.wait_for_function("document.activeElement.closest('#concepts') !== null")
    page.keyboard.press("Space")
    page.wait_for_selector("text=/Strength of/")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id === 'generate'"):
            break
    assert page.evaluate("document.activeElement.id") == "generate"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    drawn(page, 4)
    assert len(list((here / "outputs").glob("*.png"))) == 4


def test_regions(page: "Page", here: Path) -> None:
    tab(page, "Regions")
    square = page.locator("#board .board")
    square.wait_for()
    frame = square.bounding_box()
    assert frame
    for left, right in ((0.05, 0.45), (0.55, 0.95)):
        page.mouse.move(frame["x"] + left * frame["width"], frame["y"] + 0.1 * frame["height"])
        page.mouse.down()
        page.mouse.move(frame["x"] + right * frame["width"], frame["y"] + 0.9 * frame["height"], steps=4)
        page.mouse.up()
    page.locator("#board .box").nth(1).wait_for()
    field(page, "region-1").fill("a <dog>")
    page.locator("#generate-regions").click()
    page.get_by_text("Box 2 has no prompt. Say what is to be there.").first.wait_for(state="attached")
    field(page, "region-2").fill("a <cat>")
    page.locator("#generate-regions").click()
    drawn(page, 1, "regions-note")
    page.locator("#regions-gallery img").first.wait_for()
    (file,) = (here / "outputs").glob("*.png")
    assert read_settings(file).regions == ("0.05,0.1,0.45,0.9: a <dog>", "0.55,0.1,0.95,0.9: a <cat>")

    page.locator("#clear").click()
    page.get_by_text("Drag to draw a box").wait_for()
    page.locator("#regions-more button").first.click()
    page.locator("#regions-dropped input[type=file]").set_input_files(file)
    page.locator("#board .box").nth(1).wait_for()
    said(page, "region-2", "a <cat>")
    page.locator("#generate-regions").click()
    while len(files := sorted((here / "outputs").glob("*.png"))) < 2:
        page.wait_for_timeout(100)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_concepts_of_boxes_without_a_pointer(page: "Page", here: Path) -> None:
    """Chips write the tokens, strengths are each concept's own, and what a prompt says switches chips on."""
    tab(page, "Regions")
    page.locator("#halves").press("Enter")
    page.locator("#concepts-1").get_by_label("dog", exact=True).press("Space")
    said(page, "region-1", "a <dog>")
    field(page, "region-2").fill("a <cat> in a hat")
    field(page, "region-2").press("Tab")
    page.wait_for_function("document.querySelectorAll('#concepts-2 input:checked').length === 1")
    type_number(page.get_by_label("number input for Strength of cat"), 0.5)
    page.locator("#generate-regions").press("Enter")
    drawn(page, 1, "regions-note")
    made = read_settings(next((here / "outputs").glob("*.png")))
    assert made.regions == ("0,0,0.5,1: a <dog>", "0.5,0,1,1: a <cat> in a hat")
    assert made.concepts == {"dog": 1.0, "cat": 0.5}


def test_teach_stop_resume_and_use(page: "Page", here: Path, tiny_folder: Path) -> None:
    tab(page, "Train")
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
    type_number(field(page, "train-steps"), 400)
    page.locator("#start").click()
    page.locator("#status [data-state=running]").wait_for()
    page.get_by_text("of 400").wait_for()
    page.wait_for_function("parseInt(document.querySelector('#status').innerText.match(/step (\\d+)/)?.[1] ?? 0) > 55")
    page.reload()  # a page that is closed loses nothing
    page.wait_for_selector("#generate")
    tab(page, "Train")
    page.locator("#stop").click()
    page.locator("#status [data-state=stopped]").wait_for()
    assert (here / "runs/stripes/checkpoint.pt").exists()
    page.locator("#resume").click()
    page.locator("#status [data-state=done]").wait_for(timeout=600_000)
    page.locator("#preview img").wait_for()
    page.locator("#loss canvas, #loss svg").first.wait_for()
    assert read_spec(here / "adapters/stripes.safetensors").tokens == {"<stripes>": "tiger"}
    told = (here / "concepts/stripes/concept.toml").read_text()
    assert [f'"a <stripes> {word}"' in told for word in ("one", "two", "three")] == [True] * 3
    tab(page, "Generate")
    page.locator("#generate-more button").first.click()
    choose(page, "base", str(tiny_folder))
    page.wait_for_function("document.querySelector('[aria-label=\"number input for Steps\"]').value === '50'")
    assert page.get_by_label("number input for Guidance").first.input_value() == "7.5"
    switch_on(page, "concepts", "stripes")
    field(page, "prompt").fill("a <stripes>")
    draw(page, 1)


def test_captions_stay_with_their_images(page: "Page", here: Path) -> None:
    tab(page, "Train")
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30, 20), colour).save(here / f"{number}.png")
    page.locator("#images input[type=file]").set_input_files(sorted(here.glob("*.png")))
    page.wait_for_function("document.querySelector('#captions textarea').value.split('\\n').length === 3")
    field(page, "captions").fill("a red <name>\na green <name>\na blue <name>")
    page.locator("#images").get_by_label("Remove this file").first.click()
    said(page, "captions", "a green <name>\\na blue <name>")


def test_another_recipe(page: "Page", here: Path) -> None:
    tab(page, "Train")
    choose(page, "source", "tiger")
    page.locator("#given img").nth(4).wait_for()  # they push down what is below, and a list that is open stays behind
    page.locator("#train-more button").first.click()
    choose(page, "recipe", "loud")
    choose(page, "method", "lora")
    page.wait_for_function("document.querySelector('#recipe input').value === 'usual'")  # lora has no other one
    choose(page, "method", "sbora-fa")
    choose(page, "recipe", "loud")
    page.locator("#start").click()
    page.locator("#status [data-state=running]").wait_for()
    page.get_by_text("of 200").wait_for()
    page.locator("#stop").click()
    page.locator("#status [data-state=stopped]").wait_for()
    told = json.loads((here / "runs/tiger/run.json").read_text())
    assert told["config"]["output_penalty"] == configure("emoji64", "sbora-fa", {"recipe": "loud"}).loss.output_penalty


def test_what_training_refuses(page: "Page", here: Path) -> None:
    tab(page, "Train")
    page.locator("#start").click()
    page.get_by_text("Use small letters, digits and -", exact=False).wait_for(state="attached")
    field(page, "name").fill("dog")
    page.locator("#start").click()
    page.get_by_text("Dog is in the library already.", exact=False).wait_for(state="attached")
    (here / "fake.png").write_text("not an image")
    page.locator("#images input[type=file]").set_input_files(here / "fake.png")
    page.wait_for_function("document.querySelector('#captions textarea').value !== ''")
    field(page, "name").fill("fake")
    field(page, "noun").fill("mug")
    page.locator("#start").click()
    page.get_by_text("cannot be read. Drop JPG, PNG or WebP images.", exact=False).wait_for(state="attached")
    assert not (here / "concepts/fake").exists()


@pytest.mark.parametrize("how", ["Sum", "Fuse"])
def test_merge(page: "Page", here: Path, how: str) -> None:
    tab(page, "Merge")
    switch_on(page, "merge-concepts", "dog", "cat")
    page.get_by_text("each of them can be removed again, bit for bit").wait_for()
    assert page.locator("#ledger .ledger span").all_inner_texts()[:2] == ["dog", "cat"]
    page.locator("#how").get_by_text(how).click()
    field(page, "merge-name").fill("both")
    page.locator("#merge").click()
    page.locator("#merge-grid img").wait_for()
    merged = Adapter.load(here / "adapters/both.safetensors")
    assert set(merged.spec.tokens) == {"<dog>", "<cat>"}
    tab(page, "Generate")
    page.locator("#concepts").get_by_label("both", exact=True).wait_for()


def test_measure(page: "Page", here: Path) -> None:
    """A concept alone, and in a merge: both in the table, the scatter and the images."""
    dog, cat = (Adapter.load(here / f"adapters/{name}.safetensors") for name in ("dog", "cat"))
    merge([dog, cat], [1.0, 1.0], "sum").save(here / "adapters/both.safetensors")
    tab(page, "Measure")
    page.locator("#measure-concepts").get_by_label("dog", exact=True).wait_for()
    switch_on(page, "measure-concepts", "dog")
    choose(page, "measure-merged", "both")
    page.locator("#seeds").get_by_label("1", exact=True).check()
    page.locator("#measure").click()
    page.get_by_text("Done.").wait_for(timeout=600_000)
    for model in ("single", "merged"):
        page.locator("#scores").get_by_text(model, exact=True).filter(visible=True).first.wait_for()
    page.locator("#scatter canvas, #scatter svg").first.wait_for()
    page.locator("#measure-grid img").nth(1).wait_for()
    assert (here / "evaluations/dog-in-both-x1/report.json").exists()


def test_a_measurement_is_stopped(page: "Page", here: Path) -> None:
    tab(page, "Measure")
    switch_on(page, "measure-concepts", "dog")
    page.locator("#measure").click()
    page.locator("#measure-status").get_by_text("Preparing …").wait_for()
    page.locator("#measure-stop").click()
    page.locator("#measure-status").get_by_text("Stopped.").wait_for()
    page.locator("#measure-stop").wait_for(state="hidden")
    assert not list(here.glob("evaluations/*/report.json"))


def test_phone(page: "Page") -> None:
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    for name in ("Generate", "Regions", "Train", "Merge", "Measure"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], f"{name} scrolls sideways"
