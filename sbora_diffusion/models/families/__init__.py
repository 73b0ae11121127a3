"""The families of base models, one file each."""
