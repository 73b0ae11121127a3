"""The tiny models of the adapter tests."""

from ..adapters.conftest import tiny

__all__ = ["tiny"]
