"""Unlabelled pictures from a folder, for measuring what a network makes of them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError

SUFFIXES = frozenset(Image.registered_extensions())


def load_pictures(folder: Path, count: int, side: int, image_format: str, seed: int = 0) -> Tensor:
    """A random choice of the pictures below a folder, their middles cut square.

    Args:
        count: how many; all of them, where there are fewer.
        side: length in pixels that the shorter side is brought to, and of the square.
        image_format: "RGB" or "BGR".

    Returns:
        uint8 of shape (N, 3, side, side).

    Raises:
        InputError: if the folder is none or holds no pictures, or one of them cannot be read.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise InputError(f"{folder} holds no pictures: name a folder of about 100, of any names")
    chosen = np.random.default_rng(seed).permutation(len(paths))[:count]
    pictures = []
    for path in (paths[i] for i in chosen):
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except OSError as error:
            raise InputError(f"{path} cannot be read as a picture: {error}") from None
        square = np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR))
        pictures.append(square[..., ::-1] if image_format == "BGR" else square)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
