"""Helpers of the studies and the benchmark."""
