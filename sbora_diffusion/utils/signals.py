"""Ctrl-C that waits for a moment at which it can be told."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Meanwhile Ctrl-C is remembered, and raised at the end; a second one is raised at once.

    For calls into native code that calls Python back: safetensors makes an error of its own, or a half-loaded model,
    out of a KeyboardInterrupt. Nothing is changed in another thread than the main one, nor where Ctrl-C does something
    else.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    asked = False

    def remember(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:
            raise KeyboardInterrupt
