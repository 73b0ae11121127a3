"""What all tests share: one thread, Ctrl-C, a tiny Stable Diffusion pipeline loaded by the real code, two concepts.

diffusers and PEFT are imported inside the fixtures: tests/clip must prepare torchvision before them.
"""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from sbora_diffusion.data.concept import Concept
    from sbora_diffusion.models.base import Base
    from sbora_diffusion.recipes.config import TrainConfig


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from threads, and wait for each other on a busy machine; here and in subprocesses."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """Ctrl-C works in tests and in the processes they start, even where a script started pytest in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .tiny_pipeline import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .tiny_sd2 import save_tiny_sd2

    return save_tiny_sd2(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(tiny_folder: Path) -> "Base":
    from sbora_diffusion.models.base import load_base

    return load_base(str(tiny_folder))


@pytest.fixture
def concept(tmp_path: Path) -> "Concept":
    from .helpers import save_concept

    return save_concept(tmp_path)


@pytest.fixture
def config() -> "TrainConfig":
    from .helpers import short_config

    return short_config()


@pytest.fixture
def tall(tmp_path: Path) -> "Concept":
    from .helpers import save_tall_concept

    return save_tall_concept(tmp_path)
