"""(h) The studio in a browser: from the click to the first picture, with concepts switched on and off, and in training.

    python benchmarks/bench_studio.py [--rounds 5] [--tiny] [--out FILE]

emoji64 with a concept of rank 8, at the page's own settings, in a headless Chromium (Playwright, of the extra `test`).
A picture counts when the browser has it. "just switched" minus the one after it is what switching costs. In the second
half a training of emoji64 runs beside it, on the same cores.
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
from bench_startup import random_adapter

from sbora_diffusion.diffusion.base import load_base
from sbora_diffusion.diffusion.run_folder import read_log

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 300  # seconds
CLICK = """async () => {
  const picture = () => document.querySelector("#gallery img"), before = picture()?.src, start = performance.now();
  document.querySelector("#generate").click();
  while (!picture() || picture().src === before || !picture().complete) await new Promise(requestAnimationFrame);
  return performance.now() - start;
}"""

app = new_app()


@app.command()
def main(rounds: Rounds = 5, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapters").mkdir()
        random_adapter(load_base("emoji64")).save(folder / "adapters" / "dog.safetensors")
        with studio(folder) as address, opened(address) as page:
            rows = measured(page, address, rounds, tiny, beside="nothing")
            with training(folder):
                rows += measured(page, address, rounds, tiny, beside="a training")
    save("studio", torch.device("cpu"), rows, out, rounds=rounds, tiny=tiny, wall=True)


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
            page.get_by_label("number input for Steps").fill("1")
            page.get_by_label("number input for Steps").press("Tab")
        for way in ("base", "with a concept"):
            page.locator("#concepts").get_by_label("dog", exact=True).set_checked(way != "base")
            page.wait_for_timeout(500)  # the page shows the concept's slider
            turn |= {f"{way}, just switched": _click(page), way: _click(page)}
        for way, value in turn.items() if number else ():
            times.setdefault(way, []).append(value)
    return compared(times, beside=beside)


def _click(page: "Page") -> float:
    """Seconds from a click to a new picture."""
    return page.evaluate(CLICK) / 1e3


@contextmanager
def studio(folder: Path) -> Iterator[str]:
    """The command itself, in a process of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with _process(folder, "ui", "--port", str(port)):
        _wait(lambda: _answers(port))
        yield address


@contextmanager
def training(folder: Path) -> Iterator[None]:
    """One that goes on until the end of the block, at work already."""
    with _process(folder, "train", "--concept", "cat", "--set", "steps=1000000"):
        _wait(lambda: len(read_log(folder / "runs" / "cat")) > 1)
        yield


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


@contextmanager
def _process(folder: Path, *words: str) -> Iterator[None]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sbora_diffusion", *words]
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(is_there: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_there():
        if time.monotonic() > end:
            raise TimeoutError("a process did not start")
        time.sleep(0.2)


if __name__ == "__main__":
    app()
