"""Inference backends: token sequences in, signals out."""
