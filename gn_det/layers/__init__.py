"""Normalisation layers; they need torch alone and know nothing of configs."""

from .group_norm import GroupNorm
from .weight_standardization import standardize_weight

__all__ = ["GroupNorm", "standardize_weight"]
