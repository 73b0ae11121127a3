"""Utilities for all rooms: errors, files, locks, signals, the model hub, text, older names."""
