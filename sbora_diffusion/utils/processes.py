"""How this package starts Python processes."""

import sys


def isolated(*words: str) -> tuple[str, ...]:
    """Return a Python command that imports nothing from its working folder, as plain -m and -c would (-P)."""
    return (sys.executable, "-P", *words)
