"""Adapters in the formats of other programs, and back: PEFT, diffusers, kohya, and files of token embeddings."""
