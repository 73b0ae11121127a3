"""The one exception that is meant for users (what was got, what is allowed, what to do), and delayed Ctrl-C."""

import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from sbora_diffusion.utils.text import printable


class SboraError(Exception):
    """A one-line error for users: invalid input, or something missing.

    Args:
        message: what was got and what is allowed, without a full stop at the end.
        hint: what to do, as an imperative sentence.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.hint = hint


def guess(got: str, known: Collection[str]) -> str:
    """Return the start of a hint, such as "did you mean dragon or dog? ", or "" if no known word is similar."""
    close = get_close_matches(got, known, n=2)
    return f"did you mean {' or '.join(close)}? " if close else ""


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block; a second Ctrl-C is raised immediately.

    For native code that calls back into Python: safetensors turns a KeyboardInterrupt into an error of its own, or a
    half-loaded model. Has no effect outside of the main thread, or if Ctrl-C has another handler.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    is_pending = False

    def remember(number: int, frame: Any) -> None:
        nonlocal is_pending
        if is_pending:
            signal.default_int_handler(number, frame)
        is_pending = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if is_pending:
            raise KeyboardInterrupt
