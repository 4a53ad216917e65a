"""Publish masked datasets to the Hugging Face Hub, and fetch them."""
