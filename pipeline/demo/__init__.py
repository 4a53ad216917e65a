"""The complete pipeline on a small, self-generated example."""
