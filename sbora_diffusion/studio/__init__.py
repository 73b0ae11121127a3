"""The studio: what stands behind the page, and its tabs."""
