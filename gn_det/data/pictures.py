"""Unlabelled pictures from a folder, for measuring what a network makes of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError

SUFFIXES = frozenset(Image.registered_extensions())


def choose_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """A random choice of the pictures below a folder; all of them, where there are fewer.

    Raises:
        InputError: if the folder is none or holds no pictures.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise InputError(f"{folder} holds no pictures: name a folder of about 100, of any names")
    return [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))[:count]]


def load_pictures(paths: Iterable[Path], side: int, image_format: str) -> Tensor:
    """Pictures of any sizes as one batch, their middles cut square.

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
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except OSError as error:
            raise InputError(f"{path} cannot be read as a picture: {error}") from None
        square = np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR))
        pictures.append(square[..., ::-1] if image_format == "BGR" else square)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
