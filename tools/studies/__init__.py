"""Code that only the studies and the benchmark need."""
