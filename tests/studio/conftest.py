"""A library of random concepts, the studio as a process of its own, and a real Chromium that looks at it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench_studio import FLAGS, find_chromium

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.studio.session import Folders, Workshop

from ..adapters.random_adapters import adapter
from ..tiny_pipeline import save_tiny_pipeline

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

DESKTOP, PHONE = (1280, 900), (390, 844)
CLI = [sys.executable, "-c", "from sbora_diffusion.cli.app import main; main()"]


def needed(what: str, found: object) -> None:
    """Skip where something is not installed, but fail on the machines that check everything."""
    if not found and os.environ.get("SBORA_CI"):
        pytest.fail(f"{what} is needed here")
    if not found:
        pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


def random_concept(base: Base, name: str, start: int, scale: float = 0.02) -> Adapter:
    """A concept of rank 4 for a base model."""
    made = adapter(
        Interval(start, 4),
        seed=start,
        shapes=base.layer_shapes,
        base_id=base.id,
        base_fingerprint=base.fingerprint,
        tokens={f"<{name}>": name},
        name=name,
    )
    width = base.pipeline.text_encoder.config.hidden_size
    factors = {key: type(factor)(factor.index, factor.weight * scale) for key, factor in made.factors.items()}
    tokens = {key: value.repeat(1, width // value.shape[1]) * scale for key, value in made.tokens.items()}
    return Adapter(made.spec, factors, tokens)


@pytest.fixture(scope="session")
def emoji_concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with a random dog and a random cat for emoji64."""
    folder, base = tmp_path_factory.mktemp("library"), load_base("emoji64")
    for place, name in enumerate(("dog", "cat")):
        random_concept(base, name, 4 * place).save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def workshop(tmp_path: Path, tiny_folder: Path) -> Workshop:
    """With the concepts dog and cat."""
    base = load_base(str(tiny_folder))
    (tmp_path / "adapters").mkdir()
    for place, name in enumerate(("dog", "cat")):
        random_concept(base, name, 4 * place).save(tmp_path / "adapters" / f"{name}.safetensors")
    folders = Folders(adapters=tmp_path / "adapters", outputs=tmp_path / "outputs")
    return Workshop(folders, (str(tiny_folder),))


@pytest.fixture
def here(tmp_path: Path, emoji_concepts: Path) -> Path:
    """The folder that a studio is opened in."""
    (tmp_path / "here").mkdir()
    shutil.copytree(emoji_concepts, tmp_path / "here" / "adapters")
    return tmp_path / "here"


@pytest.fixture
def address(here: Path, tiny_folder: Path) -> Iterator[str]:
    """Where a studio is served, by the command itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*CLI, "ui", "--port", str(port), "--base", str(tiny_folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (here.parent / "log.txt").open("wb") as log:
        process = subprocess.Popen(words, cwd=here, stderr=log, stdout=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, (here.parent / "log.txt").read_text()
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[BrowserContext]":
    """Headless, with nothing of anybody's profile."""
    path = find_chromium()
    needed("Chromium (apt-get install chromium)", path)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        needed("playwright", None)
        raise
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=path, args=list(FLAGS), accept_downloads=True
        )
        yield context
        context.close()


@pytest.fixture
def page(browser: "BrowserContext", address: str) -> "Iterator[Page]":
    """The studio's page at desktop width; fails where the browser's console tells of an error."""
    errors: list[str] = []
    page = browser.new_page()
    page.set_viewport_size({"width": DESKTOP[0], "height": DESKTOP[1]})
    page.set_default_timeout(180_000)  # of a busy machine
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    outside: list[str] = []
    page.on("request", lambda request: None if _is_ours(request.url, address) else outside.append(request.url))
    page.goto(address)
    page.wait_for_selector("#generate")
    yield page
    page.close()
    assert not errors
    assert not outside, "the page asked other machines"


def _is_ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))
