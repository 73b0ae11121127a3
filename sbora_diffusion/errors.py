"""The one exception that is meant for users: what was got, what is allowed, what to do."""


class SboraError(Exception):
    """A defect in what the user gave us, told in one line.

    Args:
        message: what was got and what is allowed, without a trailing full stop.
        hint: what to do about it, an imperative sentence.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
