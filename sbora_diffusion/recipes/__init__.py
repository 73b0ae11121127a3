"""The settings of a training and their defaults: a readable TOML file for each base model and method."""
