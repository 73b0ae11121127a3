"""Ctrl-C while a base model is loaded, and where it is not ours to hold."""

import signal
import threading
from pathlib import Path

import pytest

from sbora_diffusion.models import loading
from sbora_diffusion.models.base import load_base
from sbora_diffusion.utils.errors import SboraError, interrupts_held

from ..tiny_pipeline import save_tiny_pipeline


def test_it_waits_and_is_raised_at_the_end() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_is_raised_at_once() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached == []


def test_interrupt_replaces_other_errors() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise OSError("unable to load weights")


def test_other_threads_and_other_handlers_are_left_alone() -> None:
    seen: list[object] = []

    def look() -> None:
        with interrupts_held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        look()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == [signal.default_int_handler, signal.SIG_IGN]


def test_a_stop_while_loading_is_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the place where libraries turn it into an OSError; the real ones load the model all the same."""
    base = str(save_tiny_pipeline(tmp_path / "base"))
    real = loading._load

    def interrupted(*words: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return real(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_base(base)
    monkeypatch.setattr(loading, "_load", real)
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SboraError, match="could not load base model"):
        load_base(base)
