"""Show masked datasets."""
