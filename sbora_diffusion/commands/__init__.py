"""What the command line offers: a function a command; torch and everything on it is imported inside them."""
