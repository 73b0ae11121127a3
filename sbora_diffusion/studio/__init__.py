"""The studio: a web page to generate, train, merge and evaluate."""
