"""Engines: how a function is mapped over shards."""
