"""The pictures of a data set, looked at file by file, and what Detectron2 would misread copied."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from .findings import Findings

ORIENTATION = 0x0112  # EXIF's tag
# Of a picture's values, that black and white are set to when more than 8 bits become 8
PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class PictureFile:
    """What a file turned out to be.

    Args:
        size: (width, height) in pixels that the annotations are meant in; None if unreadable.
        turned: (width, height) as Detectron2 would read it, after EXIF's rotation.
        digest: of the file's bytes.
        deep: whether it has more than 8 bits a value.
        error: why it cannot be used, or "".
    """

    size: tuple[int, int] | None
    turned: tuple[int, int] | None
    digest: str
    deep: bool
    error: str


def examine(path: Path) -> PictureFile:
    """Read a file whole, and decode it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return PictureFile(None, None, "", False, error.strerror or str(error))
    digest = sha256(content).hexdigest()
    try:
        with Image.open(BytesIO(content)) as file:
            file.load()
            turned = file.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            size, deep = file.size, file.mode.startswith(("I", "F"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return PictureFile(None, None, digest, False, str(error))
    return PictureFile(size, size[::-1] if turned else size, digest, deep, "")


def missing_pictures(entries: Sequence[dict[str, Any]], folder: Path, found: Findings) -> None:
    """Find files that are missing, without reading the others; see `inspect_pictures`."""
    for entry in entries:
        if not (folder / str(entry.get("file_name"))).is_file():
            found.add("pictures missing", entry.get("file_name"), _put_into(folder), stops=True)


def _put_into(folder: Path) -> str:
    return f"put them into {folder}, or take them out of the annotation file"


def inspect_pictures(
    entries: Sequence[dict[str, Any]], folder: Path, found: Findings
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Find files that are missing, damaged, of another size than is listed, or of too many bits.

    Args:
        entries: the `images` of a COCO instances file.
        folder: that `file_name`s are meant in.
        found: what is noticed goes in here.

    Yields:
        for each readable picture its entry with `width` and `height`, the digest of its file, and
        how it has to be copied: "" not at all, "turned" as EXIF has it, or "as stored".
    """
    with ThreadPoolExecutor() as pool:
        paths = [folder / str(entry.get("file_name")) for entry in entries]
        for entry, file in zip(entries, pool.map(examine, paths), strict=True):
            name = str(entry.get("file_name"))
            if file.size is None or file.turned is None:
                what = "pictures that cannot be read" if file.digest else "pictures missing"
                told = f"{name}: {file.error}" if file.digest else name
                found.add(what, told, _put_into(folder), stops=True)
                continue
            listed = (entry.get("width"), entry.get("height"))
            copy = "turned" if file.deep else ""
            if file.deep:
                then = f"copies of 8 bits are made, black and white at {PERCENTILES} percent"
                found.add("pictures of more than 8 bits", name, then)
            width, height = file.turned
            if listed == file.size != file.turned:
                then = "their annotations are not: copies without that rotation are made"
                found.add("pictures that EXIF rotates", name, then)
                (width, height), copy = file.size, "as stored"
            elif listed not in (file.turned, (None, None)):
                told = f"{name}: {width}x{height}, listed as {listed[0]}x{listed[1]}"
                then = "mend width and height, or the boxes would be somewhere else"
                found.add("pictures of another size than listed", told, then, stops=True)
            yield {**entry, "width": width, "height": height}, file.digest, copy


def copy_picture(source: Path, target: Path, how: str) -> None:
    """Write a lossless copy of 8 bits without EXIF's tags, "turned" by them or "as stored"."""
    with Image.open(source) as file:
        picture = to_eight_bits(ImageOps.exif_transpose(file) if how == "turned" else file)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A new picture has none of the old one's tags
    Image.fromarray(np.asarray(picture)).save(target)


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 or 32 bits a value as 8, stretched between two of its own percentiles.

    Every picture by itself, so that one that comes alone later is treated alike. Others come back
    as they are, in RGB.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("RGB")
    values = np.asarray(picture, dtype=np.float64)
    values = np.nan_to_num(values)
    low, high = np.percentile(values, PERCENTILES)
    stretched = (values - low) / max(high - low, 1e-12)
    return Image.fromarray((255 * stretched.clip(0, 1)).round().astype(np.uint8))


def read_picture(path: Path) -> np.ndarray:
    """A picture as it was trained on: turned as EXIF has it, and of 8 bits.

    Returns:
        uint8 of shape (H, W, 3), RGB.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            return np.asarray(to_eight_bits(ImageOps.exif_transpose(file)).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from None
