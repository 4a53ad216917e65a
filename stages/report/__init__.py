"""Looking at masked datasets."""
