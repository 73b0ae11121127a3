"""What a visitor is told: errors as a sentence and what to do, never as a stack trace."""

import functools
import html
import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

SECONDS = 12  # that a message stays


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A page's event handler, whose errors become messages."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*values: Any) -> Iterator[Any]:
            with _as_messages():
                yield from handler(*values)

        return stream

    @functools.wraps(handler)
    def call(*values: Any) -> Any:
        with _as_messages():
            return handler(*values)

    return call


def sentence(text: str) -> str:
    """With a capital and a full stop, and `<dog>` as it is, though the page reads HTML."""
    text = text[:1].upper() + text[1:]
    return html.escape(text if text.endswith((".", "!", "?")) else f"{text}.")


def in_words(defect: SboraError) -> str:
    """What is wrong, and what to do."""
    return " ".join(sentence(part) for part in (str(defect), defect.hint) if part)


def warn_of_missing(wanted: Iterable[str], known: Collection[str]) -> None:
    """Say which concepts of an image are not here."""
    if missing := sorted(set(wanted).difference(known)):
        gr.Warning(f"Not in this library: {', '.join(missing)}")


@contextmanager
def _as_messages() -> Iterator[None]:
    try:
        yield
    except SboraError as defect:
        raise _message(in_words(defect)) from None
    except gr.Error:
        raise
    except MemoryError:
        raise _message("Out of memory. Close other programs, or make fewer images.") from None
    except OSError as error:
        log.exception("a file could not be used")
        raise _message(f"{sentence(error.strerror or 'a file could not be used')} See the terminal.") from None
    except Exception:
        log.exception("a handler of the page failed")
        raise _message("This is a mistake of ours: the terminal that the studio runs in says more.") from None


def _message(text: str) -> gr.Error:
    return gr.Error(text, duration=SECONDS, title="That did not work", print_exception=False)
