"""(h) The studio: from a click in a browser to the first image, alone and beside a training, and switching concepts.

    python benchmarks/bench_studio.py [--rounds 5] [--tiny] [--out FILE]

emoji64 with a concept of rank 8, at the page's own settings, in a headless Chromium (Playwright, of the extra `test`).
An image counts when the browser has it; in the second half a training of emoji64 runs beside it, on the same cores.
Switching is what a click adds to the drawing when the concepts have changed since the last one: timed in this process,
where nothing is drawn, on a model with four concepts in it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from bench_common import Out, Rounds, Row, Tiny, compared, new_app, save
from bench_startup import RANK, random_adapter

from sbora_diffusion.models.base import load_base
from sbora_diffusion.studio.session import Folders, Workshop
from sbora_diffusion.training.checkpoint import read_log

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
CONCEPTS = ("dog", "cat", "fox", "owl")
PATIENCE = 300  # seconds
CLICK = """() => new Promise(done => {
  const gallery = document.querySelector("#gallery"), start = performance.now();
  const sources = () => [...gallery.querySelectorAll("img")].map(image => image.src), before = new Set(sources());
  gallery.addEventListener("load", event => {  // load does not bubble: caught on its way down
    if (event.target.tagName === "IMG" && !before.has(event.target.src)) done(performance.now() - start);
  }, true);
  document.querySelector("#generate").click();
})"""

app = new_app()


@app.command()
def main(rounds: Rounds = 5, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), load_base("emoji64")
        (folder / "adapters").mkdir()
        for place, concept in enumerate(CONCEPTS):
            random_adapter(base, concept, place * RANK).save(folder / "adapters" / f"{concept}.safetensors")
        rows = switched(Folders(adapters=folder / "adapters"), rounds)
        with studio(folder) as address, opened(address) as page:
            rows += measured(page, address, rounds, tiny, beside="nothing")
            with training(page, folder):
                rows += measured(page, address, rounds, tiny, beside="a training")
    save("studio", torch.device("cpu"), rows, out, rounds=rounds, tiny=tiny, wall=True)


def switched(folders: Folders, rounds: int) -> list[Row]:
    """Milliseconds of each change, a hundred times each for five rounds, after one round that does not count."""
    workshop, four, three = Workshop(folders), dict.fromkeys(CONCEPTS, 1.0), dict.fromkeys(CONCEPTS[:3], 1.0)
    changes = {
        "one of four off": three,
        "one of four on": four,
        "one strength of four": four | {"dog": 0.5},
        "all four off": {},
        "all four on": four,
    }
    times: dict[str, list[float]] = {way: [] for way in changes}
    for number in range(20 * rounds + 1):
        for way, strengths in changes.items():
            began = time.perf_counter()
            workshop.with_model("emoji64", strengths, lambda _: None)
            if number:
                times[way].append(time.perf_counter() - began)
    return compared(times, beside="nothing")


def measured(page: "Page", address: str, rounds: int, tiny: bool, beside: str) -> list[Row]:
    """Milliseconds of each way in turns, after one round that does not count."""
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        began = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("#concepts label")
        turn = {"the page is there": time.perf_counter() - began}
        page.locator("#count").get_by_label("1", exact=True).check()
        if tiny:
            page.locator("#generate-more button").first.click()
            type_number(page.get_by_label("number input for Steps"), 1)
        for way in ("base", "with a concept"):
            page.locator("#concepts").get_by_label("dog", exact=True).set_checked(way != "base")
            page.wait_for_timeout(500)  # the page shows the concept's slider
            turn[way] = page.evaluate(CLICK) / 1e3
        for way, value in turn.items() if number else ():
            times.setdefault(way, []).append(value)
    return compared(times, beside=beside)


def type_number(field: "Locator", value: float) -> None:
    """Until it stays: Gradio writes the first value again just after it has shown a field."""

    def stays() -> bool:
        field.fill(str(value))
        field.press("Tab")
        field.page.wait_for_timeout(500)
        return field.input_value() == str(value)

    _wait(f"{value} stays in its field", stays)


@contextmanager
def studio(folder: Path) -> Iterator[str]:
    """The command itself, in a process of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sbora_diffusion", "ui", "--port", str(port)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=log, stderr=log
        )
    try:
        _wait("the studio answers", lambda: _answers(port))
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


@contextmanager
def training(page: "Page", folder: Path) -> Iterator[None]:
    """One that the studio has been asked for, and that goes on until the end of the block; at work already."""
    page.get_by_role("tab", name="Train", exact=True).click()
    page.locator("#source input").click()
    page.get_by_role("option", name="horse", exact=True).click()
    page.locator("#train-more button").first.click()
    type_number(page.locator("#train-steps input").first, 20000)
    page.locator("#start").click()
    _wait("the training is at work", lambda: len(read_log(folder / "runs" / "horse")) > 1)
    try:
        yield
    finally:
        page.get_by_role("tab", name="Train", exact=True).click()
        page.locator("#stop").click()
        page.locator("#status [data-state=stopped]").wait_for()


def find_chromium() -> str | None:
    """The system's."""
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


@contextmanager
def opened(address: str) -> "Iterator[Page]":
    """The page in a browser, after the model has been loaded."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise typer.BadParameter("no Chromium is installed (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(profile, executable_path=path, args=list(FLAGS))
        page = browser.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(address)
        page.wait_for_selector("#concepts label")
        yield page
        browser.close()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {PATIENCE} s until {what}")
        time.sleep(0.2)


if __name__ == "__main__":
    app()
