"""What all tests share."""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from threads, and wait for each other on a busy machine; here and in subprocesses."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
