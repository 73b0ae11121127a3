"""Every tab used as a visitor would, in a real browser; trainings and evaluations are in test_page_jobs.py."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench_studio import type_number
from PIL import Image

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.image_file import read_settings

from .conftest import PHONE
from .visitor import choose, fewer_steps, field, generate, open_tab, select, wait_for_images, wait_for_value

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.timeout(900)


def test_generate_download_and_restore(page: "Page", here: Path) -> None:
    select(page, "concepts", "dog")
    field(page, "prompt").fill("a on the beach")
    field(page, "prompt").evaluate("area => area.setSelectionRange(1, 1)")
    page.get_by_role("button", name="<dog>", exact=True).click()
    wait_for_value(page, "prompt", "a <dog> on the beach")
    type_number(page.get_by_label("number input for Strength of dog"), 0.5)
    fewer_steps(page)
    generate(page, 4)
    page.locator("#generate-gallery img").first.click()
    with page.expect_download() as download:
        page.locator("#generate-gallery").get_by_label("Download").first.click()
    download.value.save_as(here / "downloaded.png")
    made = read_settings(here / "downloaded.png")
    assert (made.prompt, made.seed, made.steps, made.concepts) == ("a <dog> on the beach", 0, 2, {"dog": 0.5})
    files = sorted((here / "outputs").glob("*.png"))
    assert len(files) == 4
    assert files[0].read_bytes() == (here / "downloaded.png").read_bytes()
    assert [read_settings(file).seed for file in files] == [0, 1, 2, 3]

    page.reload()
    page.wait_for_selector("#concepts label")
    page.locator("#generate-more button").first.click()
    page.locator("#generate-dropped input[type=file]").set_input_files(here / "downloaded.png")
    wait_for_value(page, "prompt", "a <dog> on the beach")
    page.wait_for_selector("text=Strength of dog")
    assert page.get_by_label("number input for Strength of dog").input_value() == "0.5"
    generate(page, 1)
    again = sorted((here / "outputs").glob("*.png"))[-1]
    assert Image.open(again).tobytes() == Image.open(files[0]).tobytes()


def test_errors_say_what_to_do(page: "Page") -> None:
    field(page, "prompt").fill("a <cat> at night")
    page.locator("#generate-button").click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "The prompt uses <cat>, but its concept is off. Select cat." in toast.inner_text()
    field(page, "prompt").fill("a <unicorn>")
    page.locator("#generate-button").click()
    page.get_by_text("Got the unknown token <unicorn>, known for emoji64: <cat>, <dog>", exact=False).wait_for(
        state="attached"
    )
    assert "Traceback" not in page.content()


def test_keyboard_only(page: "Page", here: Path) -> None:
    page.wait_for_selector("#concepts label")
    fewer_steps(page)
    field(page, "prompt").focus()
    page.keyboard.press("Tab")
    page.wait_for_function("document.activeElement.closest('#concepts') !== null")
    page.keyboard.press("Space")
    page.wait_for_selector("text=/Strength of/")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id === 'generate-button'"):
            break
    assert page.evaluate("document.activeElement.id") == "generate-button"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    wait_for_images(page, 4)
    assert len(list((here / "outputs").glob("*.png"))) == 4


def test_regions(page: "Page", here: Path) -> None:
    open_tab(page, "Regions")
    square = page.locator("#box-canvas .canvas")
    square.wait_for()
    frame = square.bounding_box()
    assert frame
    for left, right in ((0.05, 0.45), (0.55, 0.95)):
        page.mouse.move(frame["x"] + left * frame["width"], frame["y"] + 0.1 * frame["height"])
        page.mouse.down()
        page.mouse.move(frame["x"] + right * frame["width"], frame["y"] + 0.9 * frame["height"], steps=4)
        page.mouse.up()
    page.locator("#box-canvas .box").nth(1).wait_for()
    fewer_steps(page, "regions")  # scrolls the square away
    field(page, "region-1").fill("a <dog>")
    page.locator("#regions-button").click()
    page.get_by_text("Box 2 has no prompt. Describe what it should show.").first.wait_for(state="attached")
    field(page, "region-2").fill("a <cat>")
    page.locator("#regions-button").click()
    wait_for_images(page, 1, "regions")
    page.locator("#regions-gallery img").first.wait_for()
    (file,) = (here / "outputs").glob("*.png")
    assert read_settings(file).regions == ("0.05,0.1,0.45,0.9: a <dog>", "0.55,0.1,0.95,0.9: a <cat>")

    page.locator("#clear").click()
    page.get_by_text("Drag to draw a box").wait_for()
    page.locator("#regions-dropped input[type=file]").set_input_files(file)
    page.locator("#box-canvas .box").nth(1).wait_for()
    wait_for_value(page, "region-2", "a <cat>")
    page.locator("#regions-button").click()
    while len(files := sorted((here / "outputs").glob("*.png"))) < 2:
        page.wait_for_timeout(100)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_regions_with_the_keyboard(page: "Page", here: Path) -> None:
    """Chips write tokens, each concept has a strength, and tokens in a prompt select chips."""
    open_tab(page, "Regions")
    fewer_steps(page, "regions")
    page.locator("#halves").press("Enter")
    page.locator("#concepts-1").get_by_label("dog", exact=True).press("Space")
    wait_for_value(page, "region-1", "a <dog>")
    field(page, "region-2").fill("a <cat> in a hat")
    field(page, "region-2").press("Tab")
    page.wait_for_function("document.querySelectorAll('#concepts-2 input:checked').length === 1")
    type_number(page.get_by_label("number input for Strength of cat"), 0.5)
    page.locator("#regions-button").press("Enter")
    wait_for_images(page, 1, "regions")
    made = read_settings(next((here / "outputs").glob("*.png")))
    assert made.regions == ("0,0,0.5,1: a <dog>", "0.5,0,1,1: a <cat> in a hat")
    assert made.concepts == {"dog": 1.0, "cat": 0.5}


def test_captions_stay_with_their_images(page: "Page", here: Path) -> None:
    open_tab(page, "Train")
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30, 20), colour).save(here / f"{number}.png")
    page.locator("#images input[type=file]").set_input_files(sorted(here.glob("*.png")))
    page.wait_for_function("document.querySelector('#captions textarea').value.split('\\n').length === 3")
    field(page, "captions").fill("a red <name>\na green <name>\na blue <name>")
    page.locator("#images").get_by_label("Remove this file").first.click()
    wait_for_value(page, "captions", "a green <name>\\na blue <name>")


def test_training_refuses_invalid_input(page: "Page", here: Path) -> None:
    open_tab(page, "Train")
    page.locator("#start").click()
    page.get_by_text("Use 1 to 40 lowercase letters, digits and hyphens", exact=False).wait_for(state="attached")
    field(page, "name").fill("dog")
    page.locator("#start").click()
    page.get_by_text("Dog is already in the library.", exact=False).wait_for(state="attached")
    (here / "fake.png").write_text("not an image")
    page.locator("#images input[type=file]").set_input_files(here / "fake.png")
    page.wait_for_function("document.querySelector('#captions textarea').value !== ''")
    field(page, "name").fill("fake")
    field(page, "noun").fill("mug")
    page.locator("#start").click()
    page.get_by_text("cannot be read. Use JPG, PNG or WebP images.", exact=False).wait_for(state="attached")
    assert not (here / "concepts/fake").exists()


def test_merge(page: "Page", here: Path, tiny_concepts: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_concepts, here / "adapters", dirs_exist_ok=True)
    open_tab(page, "Merge")
    select(page, "merge-concepts", "dog", "cat")
    page.get_by_text("each of them can be removed again, bit for bit").wait_for()
    assert page.locator("#ledger .ledger span").all_inner_texts()[:2] == ["dog", "cat"]
    for how, name in (("Sum", "both"), ("Fuse", "fused")):
        page.locator("#how").get_by_text(how).click()
        field(page, "merge-name").fill(name)
        page.locator("#merge").click()
        note = "document.querySelector('#merge-note').innerText"
        page.wait_for_function(f"{note}.startsWith('{name} is now available') && !{note}.includes('Generating')")
        page.locator("#merge-grid img").wait_for()
        assert set(Adapter.load(here / f"adapters/{name}.safetensors").spec.tokens) == {"<dog>", "<cat>"}
    open_tab(page, "Generate")
    page.locator("#generate-more button").first.click()
    choose(page, "generate-base", str(tiny_folder))
    page.locator("#concepts").get_by_label("both", exact=True).wait_for()


def test_phone(page: "Page") -> None:
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    for name in ("Generate", "Regions", "Train", "Merge", "Evaluate"):
        open_tab(page, name)
        page.get_by_role("tabpanel").filter(visible=True).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], f"{name} scrolls sideways"
