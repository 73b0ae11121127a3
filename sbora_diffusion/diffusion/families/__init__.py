"""Families of base models: everything in which Stable Diffusion 1 and 2, SDXL, SD3 and FLUX differ."""
