"""Publishing masked datasets to the Hugging Face Hub, and fetching them."""
