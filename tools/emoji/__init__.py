"""How the embedded base model and its judge are built: their world, their training, their weights."""
