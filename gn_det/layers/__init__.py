"""Normalisation layers; they need torch alone and know nothing of configs."""

from .group_norm import GroupNorm

__all__ = ["GroupNorm"]
