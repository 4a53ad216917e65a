"""What `encode` is made of: rows of any source, conversations of any layout, token ids with response masks."""
