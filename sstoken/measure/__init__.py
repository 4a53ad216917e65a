"""Everything that runs a model: signals, prompt attention, generation, and the batches for them."""
