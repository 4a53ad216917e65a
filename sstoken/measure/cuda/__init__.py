"""Faster paths on CUDA: packed batches, attention and loss kernels."""
