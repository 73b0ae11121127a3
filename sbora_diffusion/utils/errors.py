"""The one exception that is meant for users: what was got, what is allowed, what to do."""

from collections.abc import Collection
from difflib import get_close_matches


class SboraError(Exception):
    """A defect in what the user gave us, told in one line.

    Args:
        message: what was got and what is allowed, without a trailing full stop.
        hint: what to do about it, an imperative sentence.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def guess(got: str, known: Collection[str]) -> str:
    """The beginning of a hint: "did you mean dragon or dog? ", or nothing where no known word is near."""
    close = get_close_matches(got, known, n=2)
    return f"did you mean {' or '.join(close)}? " if close else ""
