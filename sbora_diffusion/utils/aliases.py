"""Older names of settings and of keys in our files, which stay readable."""

from collections.abc import Mapping
from typing import Any

# Written until November 2026 -> now: in concept files, checkpoints, recipes, run logs and results.
CURRENT = {
    "output_penalty": "output_penalty",
    "final_learning_rate": "final_learning_rate",
    "class_images": "class_images",
    "validation_images": "validation_images",
    "images": "images",
    "image": "image",
}


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with every older key under its current name."""
    return {CURRENT.get(key, key): value for key, value in values.items()}
