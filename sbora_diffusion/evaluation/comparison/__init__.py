"""Comparisons of methods: the same concepts, prompts and seeds for each, in cells that are computed once."""
