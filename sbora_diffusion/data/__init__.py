"""A folder of images, turned into batches."""
