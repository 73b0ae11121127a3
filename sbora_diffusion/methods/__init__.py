"""The methods that can be trained: what each injects, trains and collects, and how it merges."""
