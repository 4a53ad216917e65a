"""`sstoken-curate demo`: the whole pipeline on a small generated example."""
