"""Unlabelled pictures from a folder, for measuring what a network makes of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError
from .image_files import read_image

# Of the formats that are read; GIF, of graphics rather than photographs, is left out
SUFFIXES = frozenset(
    (".bmp", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)


def choose_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """A random choice of the pictures below a folder; all of them, where there are fewer.

    Raises:
        InputError: if the folder is none or holds no pictures.
    """
    paths = sorted(path for path in folder.rglob("*") if is_image(path))
    if not paths:
        raise InputError(f"{folder} holds no pictures: name a folder of about 100, of any names")
    return [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))[:count]]


def is_image(path: Path) -> bool:
    """Whether a file is a picture by its name; hidden ones are notes of an operating system."""
    return path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()


def load_images(paths: Iterable[Path], side: int, image_format: str) -> Tensor:
    """Pictures of any sizes as one batch, of 8 bits, their middles cut square.

    Args:
        side: length in pixels that the shorter side is brought to, and of the square.
        image_format: "RGB" or "BGR".

    Returns:
        uint8 of shape (N, 3, side, side).

    Raises:
        InputError: if one cannot be read.
    """
    pictures = []
    for path in paths:
        picture = Image.fromarray(read_image(path))
        square = np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR))
        pictures.append(square[..., ::-1] if image_format == "BGR" else square)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
