"""The parts of `anchor`: the resumable training run, its tokens, and the history it leaves behind."""
