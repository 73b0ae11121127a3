"""Generation: prompts, regions, gating, baked pipelines, image files."""
