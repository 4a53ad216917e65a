"""The parts of `select`: reading shards with their signals, and deciding about their tokens."""
