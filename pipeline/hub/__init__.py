"""The Hugging Face Hub: a masked dataset out to a repository, and back."""
