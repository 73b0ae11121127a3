"""The losses that a training adds up."""
