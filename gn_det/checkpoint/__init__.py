"""Weights: what is known of them, how they are read, converted and loaded."""

from .facts import Facts, describe

__all__ = ["Facts", "describe"]
