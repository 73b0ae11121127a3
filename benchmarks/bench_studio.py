"""(h) The studio: from a click in a browser to the first image, alone and beside a training, and switching concepts.

    python benchmarks/bench_studio.py [--rounds 5] [--tiny] [--out FILE]

emoji64 with a concept of rank 8, at the page's own settings, in a headless Chromium (Playwright, of the extra `test`).
An image counts when the browser has loaded it; in the second half a training of emoji64 runs on the same cores.
Switching is what a click adds to sampling when the selected concepts have changed since the last one: timed in this
process, without sampling, on a model with four concepts.
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
from sbora_diffusion.studio.session import Folders, Session
from sbora_diffusion.training.checkpoint import read_log

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
CONCEPTS = ("dog", "cat", "fox", "owl")
TIMEOUT = 300  # seconds
CLICK = """() => new Promise(done => {
  const gallery = document.querySelector("#generate-gallery"), start = performance.now();
  const sources = () => [...gallery.querySelectorAll("img")].map(image => image.src), before = new Set(sources());
  gallery.addEventListener("load", event => {  // load does not bubble: caught while it is captured
    if (event.target.tagName === "IMG" && !before.has(event.target.src)) done(performance.now() - start);
  }, true);
  document.querySelector("#generate-button").click();
})"""

app = new_app()


@app.command()
def main(rounds: Rounds = 5, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = time_switching(save_concepts(folder / "adapters"), 20 * rounds)
        with studio(folder) as address, chromium() as browser:
            page = browser.new_page()
            page.set_default_timeout(1000 * TIMEOUT)
            rows += time_page(page, address, folder, rounds, tiny)
    save("studio", torch.device("cpu"), rows, out, rounds=rounds, tiny=tiny, wall=True)


def save_concepts(adapters: Path) -> Folders:
    """Save four random concepts of emoji64."""
    base = load_base("emoji64")
    for place, concept in enumerate(CONCEPTS):
        random_adapter(base, concept, place * RANK).save(adapters / f"{concept}.safetensors")
    return Folders(adapters=adapters)


def time_switching(folders: Folders, rounds: int) -> list[Row]:
    """Return the milliseconds of each change, after one round that does not count."""
    session, four, three = Session(folders), dict.fromkeys(CONCEPTS, 1.0), dict.fromkeys(CONCEPTS[:3], 1.0)
    changes = {
        "one of four off": three,
        "one of four on": four,
        "one strength of four": four | {"dog": 0.5},
        "all four off": {},
        "all four on": four,
    }
    times: dict[str, list[float]] = {way: [] for way in changes}
    for number in range(rounds + 1):
        for way, strengths in changes.items():
            began = time.perf_counter()
            session.with_model("emoji64", strengths, lambda _: None)
            if number:
                times[way].append(time.perf_counter() - began)
    return compared(times, beside="nothing")


def time_page(page: "Page", address: str, folder: Path, rounds: int, tiny: bool) -> list[Row]:
    """Return the milliseconds from a click to an image, alone and beside a training."""
    page.goto(address)
    page.wait_for_selector("#concepts label")
    rows = _time_clicks(page, address, rounds, tiny, beside="nothing")
    with training(page, folder):
        return rows + _time_clicks(page, address, rounds, tiny, beside="a training")


def _time_clicks(page: "Page", address: str, rounds: int, tiny: bool, beside: str) -> list[Row]:
    """Take turns, after one round that does not count (none if tiny)."""
    times: dict[str, list[float]] = {}
    for number in range(tiny, rounds + 1):
        began = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("#concepts label")
        turn = {"the page is there": time.perf_counter() - began}
        page.locator("#generate-count").get_by_label("1", exact=True).check()
        if tiny:
            page.locator("#generate-more button").first.click()
            type_number(page.locator("#generate-steps input[type=number]"), 1)
        for way in ("base", "with a concept"):
            page.locator("#concepts").get_by_label("dog", exact=True).set_checked(way != "base")
            page.get_by_text("Strength of dog").wait_for(state="hidden" if way == "base" else "visible")
            turn[way] = page.evaluate(CLICK) / 1e3
        for way, value in turn.items() if number else ():
            times.setdefault(way, []).append(value)
    return compared(times, beside=beside)


def type_number(field: "Locator", value: float) -> None:
    """Fill a number in until it stays: Gradio resets a field just after it is shown."""

    def is_kept() -> bool:
        field.fill(str(value))
        field.press("Tab")
        field.page.wait_for_timeout(300)
        return field.input_value() == str(value)

    _wait(f"{value} stays in its field", is_kept)


@contextmanager
def studio(folder: Path, *options: str) -> Iterator[str]:
    """Serve a studio of this folder by the command itself; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sbora_diffusion", "ui", "--port", str(port), *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError((folder / "log.txt").read_text())
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        _wait("the studio answers", answers)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT)


@contextmanager
def training(page: "Page", folder: Path) -> Iterator[None]:
    """Start a training in the studio, wait for its first steps, and stop it at the end of the block."""
    page.get_by_role("tab", name="Train", exact=True).click()
    page.locator("#source input").click()
    page.get_by_role("option", name="horse", exact=True).click()
    page.locator("#train-more button").first.click()
    type_number(page.locator("#train-steps input").first, 20000)
    page.locator("#start").click()
    _wait("the training is running", lambda: len(read_log(folder / "runs" / "horse")) > 1)
    try:
        yield
    finally:
        page.get_by_role("tab", name="Train", exact=True).click()
        page.locator("#stop").click()
        page.locator("#status [data-state=stopped]").wait_for()


def find_chromium() -> str | None:
    """Return the path of the system's browser."""
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> "Iterator[Browser]":
    """Run a headless browser."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise typer.BadParameter("Chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def _wait(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {TIMEOUT} s until {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    app()
