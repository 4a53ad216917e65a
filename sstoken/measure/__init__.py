"""Everything that runs a model: its losses, its attention on the prompt, and batches for both."""
