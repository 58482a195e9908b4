"""The pictures of a data set, looked at file by file, and what Detectron2 would misread copied."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..files import write_whole
from .findings import Findings

ORIENTATION = 0x0112  # EXIF's tag
# Of a picture's values, that black and white are set to when more than 8 bits become 8
PERCENTILES = (0.1, 99.9)
# What Pillow raises on files that it cannot read
READ_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class PictureFile:
    """What a file turned out to be.

    Args:
        stored: (width, height) in pixels without EXIF's rotation.
        turned: (width, height) with it.
        digest: of the file's bytes, "" if there is none.
        orientation: EXIF's, 1 for none.
        deep: "grey" or "colour" if it has more than 8 bits a value, else "".
        format: as Pillow calls it.
        error: why it cannot be used, or "".
    """

    stored: tuple[int, int] = (0, 0)
    turned: tuple[int, int] = (0, 0)
    digest: str = ""
    orientation: int = 1
    deep: str = ""
    format: str = ""
    error: str = ""


def examine(path: Path) -> PictureFile:
    """Read a file whole, and decode it."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        return PictureFile(error=str(error))
    digest = sha256(content).hexdigest()
    try:
        with Image.open(BytesIO(content)) as file:
            orientation = file.getexif().get(ORIENTATION, 1)
            turned = ImageOps.exif_transpose(file).size
            crosswise = orientation in (5, 6, 7, 8)
            return PictureFile(
                turned[::-1] if crosswise else turned,
                turned,
                digest,
                orientation,
                _depth(file, content),
                file.format or "",
            )
    except READ_ERRORS as error:
        return PictureFile(digest=digest, error=_why(error))


def _why(error: Exception) -> str:
    """Why a file cannot be read; Pillow's own words name the place in memory that it was in."""
    return "no picture" if isinstance(error, UnidentifiedImageError) else str(error)


def _depth(file: Image.Image, content: bytes) -> str:
    """Whether a picture has more than 8 bits, as `PictureFile.deep`."""
    if file.mode.startswith(("I", "F")):
        return "grey"
    bits = 8
    if file.format == "PNG":
        # Of the header; Pillow drops the lower half of colours of 16
        bits = content[24]
    elif file.format == "TIFF":
        tags = file.tag_v2.get(258, (8,))  # type: ignore[attr-defined]
        bits = max(tags) if isinstance(tags, tuple) else tags
    return "colour" if bits > 8 else ""


def missing_pictures(entries: Sequence[dict[str, Any]], folder: Path, found: Findings) -> None:
    """Find files that are missing, without reading the others; see `inspect_pictures`."""
    for entry in entries:
        if not (folder / entry["file_name"]).is_file():
            found.add("pictures missing", entry["file_name"], _put_into(folder), stops=True)


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
        paths = [folder / entry["file_name"] for entry in entries]
        for entry, file in zip(entries, pool.map(examine, paths), strict=True):
            name = entry["file_name"]
            if file.error and not file.digest:
                found.add("pictures missing", name, _put_into(folder), stops=True)
            elif file.error:
                then = "replace them, or take them out of the annotation file"
                found.add("pictures that cannot be read", f"{name}: {file.error}", then, stops=True)
            else:
                size, copy = _read_as(entry, file, found)
                yield {**entry, "width": size[0], "height": size[1]}, file.digest, copy


def _read_as(
    entry: dict[str, Any], file: PictureFile, found: Findings
) -> tuple[tuple[int, int], str]:
    """The size that a picture's annotations are meant in, and how it has to be copied."""
    name, listed = entry["file_name"], (entry.get("width"), entry.get("height"))
    copy = ""
    if file.deep == "colour":
        then = "bring them to 8 bits a channel"
        found.add("pictures of more than 8 bits in colour", name, then, stops=True)
    elif file.deep:
        then = f"copies of 8 bits are made, black and white at {PERCENTILES} percent"
        found.add("pictures of more than 8 bits", name, then)
        copy = "turned"
    if listed == file.stored != file.turned:
        then = "their annotations are not: copies without that rotation are made"
        found.add("pictures that EXIF rotates", name, then)
        return file.stored, "as stored"
    if file.orientation != 1:
        then = "they are read as turned; if annotated otherwise, take that tag out of them"
        found.add("pictures that EXIF turns", name, then)
        if file.format == "TIFF":
            # Detectron2 would turn what Pillow has turned
            copy = "turned"
    if listed not in (file.turned, (None, None)):
        told = f"{name}: {file.turned[0]}x{file.turned[1]}, listed as {listed[0]!r}x{listed[1]!r}"
        then = "mend width and height, or the boxes would be somewhere else"
        found.add("pictures of another size than listed", told, then, stops=True)
    return file.turned, copy


def copy_picture(source: Path, target: Path, how: str) -> None:
    """Write a lossless copy of 8 bits without EXIF's tags, "turned" by them or "as stored"."""
    with Image.open(BytesIO(source.read_bytes())) as file:
        undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(file.getexif().get(ORIENTATION, 1), 1)
        picture = to_eight_bits(ImageOps.exif_transpose(file))
    if how == "as stored":
        # From what all formats agree on, back
        picture.getexif()[ORIENTATION] = undo
        picture = ImageOps.exif_transpose(picture)
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(target, "wb") as file:
        # A new picture has none of the old one's tags
        Image.fromarray(np.asarray(picture)).save(file, format="PNG")


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 or 32 bits a value as 8, stretched between two of its own percentiles.

    Every picture by itself, so that one that comes alone later is treated alike. Others come back
    as they are, in RGB.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("RGB")
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
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
        with Image.open(BytesIO(path.read_bytes())) as file:
            return np.asarray(to_eight_bits(ImageOps.exif_transpose(file)).convert("RGB"))
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read as a picture: {_why(error)}") from None
