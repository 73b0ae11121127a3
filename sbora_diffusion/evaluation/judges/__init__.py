"""Judges: models that score images. Each module but `base` and `registry` is a kind of judge (docs/evaluation.md)."""
