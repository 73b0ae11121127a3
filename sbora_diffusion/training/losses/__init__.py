"""The losses that a training minimizes, one file each."""
