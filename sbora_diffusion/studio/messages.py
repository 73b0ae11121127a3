"""Messages on the page: an error is a sentence and what to do, never a stack trace."""

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


def show_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an event handler so that its errors appear as messages on the page."""
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
    """Return the text capitalized, with a full stop, and escaped for HTML so that `<dog>` stays readable."""
    text = text[:1].upper() + text[1:]
    return html.escape(text if text.endswith((".", "!", "?")) else f"{text}.")


def error_text(error: SboraError) -> str:
    """Return an error and its hint as sentences."""
    return " ".join(sentence(part) for part in (str(error), error.hint) if part)


def warn_of_missing(wanted: Iterable[str], known: Collection[str]) -> None:
    """Show a warning that names the concepts that are not in the library."""
    if missing := sorted(set(wanted).difference(known)):
        gr.Warning(f"Not in this library: {', '.join(missing)}")


@contextmanager
def _as_messages() -> Iterator[None]:
    try:
        yield
    except SboraError as error:
        raise _message(error_text(error)) from None
    except gr.Error:
        raise
    except MemoryError:
        raise _message("Out of memory. Close other programs, or generate fewer images.") from None
    except OSError as error:
        log.exception("a file could not be read or written")
        raise _message(f"{sentence(error.strerror or 'a file could not be used')} See the terminal.") from None
    except Exception:
        log.exception("an event handler failed")
        raise _message("Internal error. See the terminal for details.") from None


def _message(text: str) -> gr.Error:
    return gr.Error(text, duration=SECONDS, title="That did not work", print_exception=False)
