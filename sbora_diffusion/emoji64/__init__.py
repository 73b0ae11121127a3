"""The embedded base model: the world it pictures, how it was made, and its weights."""
