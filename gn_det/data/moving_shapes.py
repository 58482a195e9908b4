"""Moving `shapes`: clips whose classes differ in motion alone, generated from a seed.

Triangles move left, right, up or down, all of a clip alike, on a still background. They leave the
frame on one side and return on the other. So a single frame says nothing about the class.
"""

from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from ..files import new_dataset
from .shapes import SPLITS
from .textures import paint_background

SIDE, FRAMES = 40, 12
COUNT = 5
RADII = (5.0, 8.0)  # in pixels
SPEEDS = (1.5, 3.0)  # in pixels per frame
# Class -> direction of the motion, x and y
MOTIONS = {"down": (0, 1), "left": (-1, 0), "right": (1, 0), "up": (0, -1)}
SCALE = 4  # of the drawing before it is reduced
OUTLINE = np.array([(0.0, -1.0), (0.6, 0.8), (-0.6, 0.8)])


def draw_path(rng: Generator, motion: str) -> np.ndarray:
    """Draw the centres of a triangle in a clip of the class `motion`, (FRAMES, 2), x and y."""
    start, speed = rng.uniform(0, SIDE, size=2), rng.uniform(*SPEEDS)
    return (start + speed * np.outer(np.arange(FRAMES), MOTIONS[motion])) % SIDE


def draw_clip(rng: Generator, motion: str) -> np.ndarray:
    """Draw a clip of a class, uint8 of shape (FRAMES, SIDE, SIDE, 3), RGB."""
    frames = np.stack([paint_background(rng, SIDE, SIDE)] * FRAMES)
    for _ in range(COUNT):
        radius, colour = rng.uniform(*RADII), rng.uniform(0, 255, size=3)
        angle = rng.uniform(0, 2 * np.pi)
        for frame, centre in zip(frames, draw_path(rng, motion), strict=True):
            mask = _mask(centre, angle, radius)[..., None]
            frame[:] = mask * colour + (1 - mask) * frame
    frames += rng.normal(0, 5, frames.shape)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _mask(centre: np.ndarray, angle: float, radius: float) -> np.ndarray:
    """The share of each pixel that the triangle covers, with its copies across the borders."""
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    outline = radius * OUTLINE @ turn.T + centre
    image = Image.new("L", (SCALE * SIDE, SCALE * SIDE))
    draw = ImageDraw.Draw(image)
    for shift in np.ndindex(3, 3):
        corners = SCALE * (outline + SIDE * (np.array(shift) - 1))
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    return np.asarray(image.reduce(SCALE), dtype=float) / 255


def make_moving_shapes(root: Path, num_train: int = 600, num_val: int = 100, seed: int = 0) -> None:
    """Generate `{train,val}/CLASS/CLIP/*.png` in `root`.

    The same seed gives the same bytes. `root` is created only when the dataset is complete.

    Args:
        root: the folder to create.
        num_train, num_val: clips of all classes together, which take turns.
        seed: of the random generators.

    Raises:
        InputError: if `root` exists already, or cannot be created.
    """
    with new_dataset(root) as partial:
        for index, (split, count) in enumerate(zip(SPLITS, (num_train, num_val), strict=True)):
            for i in range(count):
                motion = [*MOTIONS][i % len(MOTIONS)]
                folder = partial / split / motion / f"{i:06d}"
                folder.mkdir(parents=True)
                frames = draw_clip(np.random.default_rng([seed, index, i]), motion)
                for time, frame in enumerate(frames):
                    Image.fromarray(frame).save(folder / f"{time:03d}.png")
