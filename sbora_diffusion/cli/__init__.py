"""The command line: a function a command; torch and everything on it is imported inside them."""
