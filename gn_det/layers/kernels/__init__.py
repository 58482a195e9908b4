"""Triton kernels of the normalisations, imported when a tensor first needs them."""
