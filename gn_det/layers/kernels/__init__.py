"""Triton kernels of the normalization operators, imported on first use."""
