"""Read, convert, calibrate and load pretrained weights."""

from .facts import Facts, describe

__all__ = ["Facts", "describe"]
