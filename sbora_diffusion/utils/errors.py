"""The one exception that is meant for users: what was got, what is allowed, what to do."""

from collections.abc import Collection
from difflib import get_close_matches


class SboraError(Exception):
    """A one-line error for users: invalid input, or something missing.

    Args:
        message: what was got and what is allowed, without a full stop at the end.
        hint: what to do, as an imperative sentence.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def guess(got: str, known: Collection[str]) -> str:
    """Return the start of a hint, such as "did you mean dragon or dog? ", or "" if no known word is similar."""
    close = get_close_matches(got, known, n=2)
    return f"did you mean {' or '.join(close)}? " if close else ""
