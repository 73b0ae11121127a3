"""Export to and import from other programs: PEFT, diffusers, kohya, and files of token embeddings."""
