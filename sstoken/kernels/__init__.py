"""Triton kernels. Each module imports Triton when its function is called, never before."""
