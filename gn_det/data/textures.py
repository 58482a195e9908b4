"""Textures of the `shapes` data set, all of them functions of a point's own coordinates."""

import numpy as np
from numpy.random import Generator
from PIL import Image


def _wave(t: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(np.pi * t)


# One pattern a category: (u, v), 1 at the object's radius -> 0..1, the mix of its two colours
_PATTERNS = {
    "disc": lambda u, v: _wave(4 * v) > 0.5,  # stripes
    "square": lambda u, v: (_wave(3.5 * u) > 0.5) ^ (_wave(3.5 * v) > 0.5),  # checks
    "triangle": lambda u, v: (_wave(4 * u) + _wave(4 * v)) / 2 > 0.7,  # dots
    "star": lambda u, v: _wave(4 * np.hypot(u, v)) > 0.5,  # rings
    "cross": lambda u, v: _wave(5 * u + 1.2 * np.sin(5 * v)) > 0.5,  # waves
    "ring": lambda u, v: _wave(4 * np.arctan2(v, u) * 2 / np.pi) > 0.5,  # rays
}


def _two_colours(rng: Generator, contrast: float) -> np.ndarray:
    """Two RGB colours, as a (2, 3) array, at least `contrast` apart in brightness."""
    while True:
        colours = rng.uniform(20, 235, size=(2, 3))
        if abs(np.subtract(*colours.mean(axis=1))) >= contrast:
            return colours


def _mix(share: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return share[..., None] * colours[0] + (1 - share[..., None]) * colours[1]


def paint_object(
    rng: Generator,
    picture: np.ndarray,
    mask: np.ndarray,
    category: str,
    frame: tuple[float, float, float, float],
) -> None:
    """Paint `category`'s texture into the masked pixels of a float (H, W, 3) picture, in place.

    Args:
        frame: x, y and radius in pixels, and turn in radians, of the object.
    """
    x, y, radius, turn = frame
    rows, columns = np.nonzero(mask)
    dx, dy = (columns + 0.5 - x) / radius, (rows + 0.5 - y) / radius
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = np.cos(turn) * dy - np.sin(turn) * dx
    share = np.asarray(_PATTERNS[category](u, v), dtype=float)
    picture[rows, columns] = _mix(share, _two_colours(rng, contrast=70))


def paint_background(rng: Generator, height: int, width: int) -> np.ndarray:
    """A float (H, W, 3) picture of smooth noise over two scales, in two random colours."""
    share = np.zeros((height, width))
    for cells, weight in ((5, 0.65), (24, 0.35)):
        noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        share += weight * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    return _mix(np.clip(share, 0, 1), _two_colours(rng, contrast=15))
