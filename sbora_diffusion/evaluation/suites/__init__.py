"""Suites of prompts, in our own layout and in those of other projects."""
