"""What an evaluation returns and writes: scores, tables, JSON and image grids."""
