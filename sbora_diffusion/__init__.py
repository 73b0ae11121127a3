"""Teach a diffusion model a concept from a handful of images, and put concepts together or take them out exactly."""

__version__ = "0.1.0"
