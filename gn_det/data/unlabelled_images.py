"""Load unlabelled images from a folder, to measure activations of a network on them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError
from .image_files import read_image

# GIF can be read, but is excluded, since it stores graphics rather than photographs
SUFFIXES = frozenset(
    (".bmp", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)


def choose_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Choose images at random from a folder and its sub-folders.

    Args:
        folder: the folder.
        count: number of images; if the folder has fewer, all are returned.
        seed: of the random choice.

    Raises:
        InputError: if the folder does not exist or has no images.
    """
    paths = sorted(path for path in folder.rglob("*") if is_image(path))
    if not paths:
        raise InputError(f"{folder} has no images: pass a folder with about 100 of them")
    return [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))[:count]]


def is_image(path: Path) -> bool:
    """Whether a path is a file with an image suffix, and not hidden, as macOS's `._*` files are."""
    return path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()


def load_images(paths: Iterable[Path], side: int, image_format: str) -> Tensor:
    """Load images of any size as one batch, resized and center-cropped to squares.

    Args:
        paths: the image files.
        side: width and height of the squares in pixels.
        image_format: "RGB" or "BGR".

    Returns:
        uint8 of shape (N, 3, side, side).

    Raises:
        InputError: if an image cannot be read.
    """
    squares = []
    for path in paths:
        image = Image.fromarray(read_image(path))
        square = np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))
        squares.append(square[..., ::-1] if image_format == "BGR" else square)
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Find the images that files and folders stand for.

    Args:
        paths: files, and folders that are searched recursively.

    Returns:
        paths of the images, in order.

    Raises:
        InputError: for a path that does not exist, and if there are no images.
    """
    images: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if path.is_dir():
            images += filter(is_image, sorted(path.rglob("*")))
        else:
            images.append(path)
    if not images:
        raise InputError(f"there are no images in {', '.join(map(str, paths))}")
    return images
