"""The whole pipeline on a small example that it makes itself."""
