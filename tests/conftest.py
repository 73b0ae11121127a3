"""What all tests share."""

import os
import signal

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from threads, and wait for each other on a busy machine; here and in subprocesses."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """Ctrl-C works in tests and in the processes they start, even where a script started pytest in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
