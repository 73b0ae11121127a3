"""Base models: loading, families, tokens, precision, several processes."""
