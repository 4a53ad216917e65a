"""What `anchor` is made of: the resumable training run, its tokens, and the history that it leaves behind."""
