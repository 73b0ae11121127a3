"""A library of random concepts, one studio process and one headless Chromium for all tests, reset for each."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import bench_studio
import pytest

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.studio.session import Folders, Session

from ..adapters.random_adapters import adapter

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESKTOP, PHONE = (1280, 900), (390, 844)
QUEUE = "studio.json"


def require(what: str, found: object) -> None:
    """Skip a test if something is not installed; fail on machines that must have everything."""
    if not found and os.environ.get("SBORA_CI"):
        pytest.fail(f"{what} is required")
    if not found:
        pytest.skip(f"{what} is not installed")


def random_concept(base: Base, name: str, start: int, scale: float = 0.02) -> Adapter:
    """Return a concept of rank 4 for a base model."""
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


def dog_and_cat(folder: Path, base_name: str) -> Path:
    """Save two random concepts."""
    base = load_base(base_name)
    for place, name in enumerate(("dog", "cat")):
        random_concept(base, name, 4 * place).save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def emoji_concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the concepts dog and cat for emoji64."""
    return dog_and_cat(tmp_path_factory.mktemp("library"), "emoji64")


@pytest.fixture(scope="session")
def tiny_concepts(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The same for the tiny base model."""
    return dog_and_cat(tmp_path_factory.mktemp("library"), str(tiny_folder))


@pytest.fixture
def session(tmp_path: Path, tiny_folder: Path, tiny_concepts: Path) -> Session:
    """A session with the concepts dog and cat of the tiny base model."""
    adapters = Path(shutil.copytree(tiny_concepts, tmp_path / "adapters"))
    return Session(Folders(adapters=adapters, outputs=tmp_path / "outputs"), (str(tiny_folder),))


def kill_jobs(folder: Path) -> None:
    """Kill the jobs that a failed test has left running in a folder of runs."""
    jobs = json.loads((folder / QUEUE).read_bytes()) if (folder / QUEUE).exists() else []
    for job in jobs:
        if job["state"] == "running":
            with suppress(ProcessLookupError):
                os.kill(job["pid"], signal.SIGKILL)


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[tuple[str, Path]]:
    """The address of a studio that the command itself serves, and its folder."""
    require("gradio", find_spec("gradio"))
    folder = tmp_path_factory.mktemp("studio")
    with bench_studio.studio(folder, "--base", str(tiny_folder)) as address:
        yield address, folder


@pytest.fixture
def here(studio: tuple[str, Path], emoji_concepts: Path) -> Iterator[Path]:
    """The folder of the studio, with nothing but the concepts dog and cat of emoji64."""
    _, folder = studio
    for path in (*folder.iterdir(), *(folder / "runs").iterdir()):
        if path.name not in ("runs", QUEUE, ".studio.lock", "log.txt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(emoji_concepts, folder / "adapters")
    yield folder
    kill_jobs(folder / "runs")


@pytest.fixture
def address(studio: tuple[str, Path], here: Path) -> str:  # noqa: ARG001 (resets the folder)
    """Where the studio is served."""
    return studio[0]


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """A headless Chromium."""
    require("Chromium (apt-get install chromium)", bench_studio.find_chromium())
    require("playwright", find_spec("playwright"))
    with bench_studio.chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: "Browser", address: str) -> "Iterator[Page]":
    """The studio's page at desktop width in a fresh profile; errors in the browser's console fail the test."""
    context = browser.new_context(viewport={"width": DESKTOP[0], "height": DESKTOP[1]}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(180_000)  # of a busy machine
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    outside: list[str] = []
    page.on("request", lambda request: None if _is_own(request.url, address) else outside.append(request.url))
    page.goto(address)
    page.wait_for_selector("#concepts label")
    yield page
    context.close()
    assert not errors
    assert not outside, "the page sent requests to other machines"


def _is_own(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))
