"""What `select` is made of: shards read with their signals, and what a method decides about them."""
