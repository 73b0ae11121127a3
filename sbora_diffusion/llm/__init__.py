"""Language models on the same adapter core: only model, data and objective differ from the diffusion side."""
