"""Older names of settings and of keys in our files, which stay readable."""

from collections.abc import Mapping
from typing import Any

# Written until November 2026 -> now: in concept files, checkpoints, recipes, run logs and results.
CURRENT = {
    "quiet_weight": "output_penalty",
    "final_rate": "final_learning_rate",
    "class_pictures": "class_images",
    "validation_pictures": "validation_images",
    "pictures": "images",
    "picture": "image",
    "as_loud": "match_response",
}


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with every older key under its current name."""
    return {CURRENT.get(key, key): value for key, value in values.items()}


def with_older_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with the older names of keys; the inverse of `with_current_names`."""
    older = {current: name for name, current in CURRENT.items()}
    return {older.get(key, key): value for key, value in values.items()}
