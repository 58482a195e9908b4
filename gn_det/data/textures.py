"""Procedural textures of the `shapes` dataset."""

import numpy as np
from numpy.random import Generator
from PIL import Image


def _wave(t: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(np.pi * t)


# One pattern per category. u and v are coordinates in units of the object's radius; the result, in
# 0..1, is the share of the first of two colours
_PATTERNS = {
    "disc": lambda u, v: _wave(4 * v) > 0.5,  # stripes
    "square": lambda u, v: (_wave(3.5 * u) > 0.5) ^ (_wave(3.5 * v) > 0.5),  # checks
    "triangle": lambda u, v: (_wave(4 * u) + _wave(4 * v)) / 2 > 0.7,  # dots
    "star": lambda u, v: _wave(4 * np.hypot(u, v)) > 0.5,  # rings
    "cross": lambda u, v: _wave(5 * u + 1.2 * np.sin(5 * v)) > 0.5,  # waves
    "ring": lambda u, v: _wave(4 * np.arctan2(v, u) * 2 / np.pi) > 0.5,  # rays
}


def _two_colours(rng: Generator, contrast: float) -> np.ndarray:
    """Draw two RGB colours, (2, 3), whose brightness differs by at least `contrast` of 255."""
    while True:
        colours = rng.uniform(20, 235, size=(2, 3))
        if abs(np.subtract(*colours.mean(axis=1))) >= contrast:
            return colours


def _mix(share: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return share[..., None] * colours[0] + (1 - share[..., None]) * colours[1]


def paint_object(
    rng: Generator,
    image: np.ndarray,
    mask: np.ndarray,
    category: str,
    frame: tuple[float, float, float, float],
) -> None:
    """Paint the texture of a category into the masked pixels of an image, in place.

    Args:
        rng: draws the colours.
        image: float (H, W, 3), RGB, 0 to 255.
        mask: bool (H, W).
        category: one of `shapes.CATEGORIES`.
        frame: x, y and radius of the object in pixels, and its rotation in radians.
    """
    x, y, radius, turn = frame
    rows, columns = np.nonzero(mask)
    dx, dy = (columns + 0.5 - x) / radius, (rows + 0.5 - y) / radius
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = np.cos(turn) * dy - np.sin(turn) * dx
    share = np.asarray(_PATTERNS[category](u, v), dtype=float)
    image[rows, columns] = _mix(share, _two_colours(rng, contrast=70))


def paint_background(rng: Generator, height: int, width: int) -> np.ndarray:
    """Draw an image of smooth noise at two scales, as a mix of two random colours.

    Returns:
        float (H, W, 3), RGB, 0 to 255.
    """
    share = np.zeros((height, width))
    for cells, weight in ((5, 0.65), (24, 0.35)):
        noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        share += weight * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    return _mix(np.clip(share, 0, 1), _two_colours(rng, contrast=15))
