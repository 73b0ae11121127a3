"""The training loop, its config, losses, optimiser, checkpoints and previews."""
