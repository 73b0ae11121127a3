"""Concept customization of Stable Diffusion: concepts, training, generation."""
