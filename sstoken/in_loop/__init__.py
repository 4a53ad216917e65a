"""Selection against the live model, inside the training step."""
