"""In-loop selection: tokens are selected inside each training step, with the model as it is then."""
