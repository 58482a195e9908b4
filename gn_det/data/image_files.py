"""The pictures of a data set, looked at file by file, and what Detectron2 would misread copied."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError, printable
from ..files import write_whole
from .findings import Findings
from .image_reader import TURNS, decode_image, read_image_bytes, starts_as_image

# Of a picture's values, that black and white are set to when more than 8 bits become 8
PERCENTILES = (0.1, 99.9)
# Of the files that are only opened; one by one their threads would wait for each other
PART = 500
MISSING, UNREADABLE = "pictures missing", "pictures that cannot be read"
REPLACE = "replace them, or take them out of the annotation file"
MAX_VALUE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ImageInfo:
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


def examine(path: Path) -> ImageInfo:
    """Read a file whole, and decode it."""
    try:
        content = read_image_bytes(path)
    except (OSError, ValueError) as error:
        return ImageInfo(error=str(error))
    digest = sha256(content).hexdigest()
    try:
        image = decode_image(content)
    except InputError as error:
        return ImageInfo(digest=digest, error=str(error))
    turned = image.upright.size
    crosswise = image.orientation in (5, 6, 7, 8)
    stored = turned[::-1] if crosswise else turned
    return ImageInfo(stored, turned, digest, image.orientation, image.deep, image.format)


def missing_images(entries: Sequence[dict[str, Any]], folder: Path, found: Findings) -> None:
    """Find files that are missing, or no images by their first bytes; see `inspect_images`."""
    parts = [entries[i : i + PART] for i in range(0, len(entries), PART)]
    with ThreadPoolExecutor() as pool:
        problems = pool.map(lambda part: [_problem_at_start(folder, e) for e in part], parts)
        for entry, problem in zip(entries, chain.from_iterable(problems), strict=True):
            if problem:
                then = _put_into(folder) if problem == MISSING else REPLACE
                found.add(problem, entry["file_name"], then, stops=True)


def _problem_at_start(folder: Path, entry: dict[str, Any]) -> str:
    """What `missing_images` finds about an entry's file, or ""."""
    try:
        # Detectron2 would open any format, EPS with the help of another program
        known = starts_as_image(folder / entry["file_name"])
    except (OSError, ValueError):
        return MISSING
    return "" if known else UNREADABLE


def _put_into(folder: Path) -> str:
    return f"put them into {folder}, or take them out of the annotation file"


def inspect_images(
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
                found.add(MISSING, name, _put_into(folder), stops=True)
            elif file.error:
                found.add(UNREADABLE, f"{name}: {file.error}", REPLACE, stops=True)
            else:
                size, copy = _read_as(entry, file, found)
                yield {**entry, "width": size[0], "height": size[1]}, file.digest, copy


def _read_as(
    entry: dict[str, Any], file: ImageInfo, found: Findings
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
        shown = "x".join(printable(side) for side in listed)
        told = f"{name}: {file.turned[0]}x{file.turned[1]}, listed as {shown}"
        then = "fix width and height, or the boxes would be somewhere else"
        found.add("pictures of another size than listed", told, then, stops=True)
    return file.turned, copy


def copy_image(source: Path, target: Path, how: str) -> None:
    """Write a lossless copy of 8 bits without EXIF's tags, "turned" by them or "as stored".

    Raises:
        OSError: if one cannot be read, or the other not be written.
        InputError: if the source cannot be decoded.
    """
    decoded = decode_image(read_image_bytes(source))
    image = to_eight_bits(decoded.upright)
    # Quarters are undone by the opposite ones, mirroring and halves by themselves
    undo = {6: 8, 8: 6}.get(decoded.orientation, decoded.orientation)
    if how == "as stored" and undo in TURNS:
        image = image.transpose(TURNS[undo])
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(target, "wb") as file:
        # A new image has none of the old one's tags
        Image.fromarray(np.asarray(image)).save(file, format="PNG")


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 or 32 bits a value as 8, stretched between two of its own percentiles.

    Every picture by itself, so that one that comes alone later is treated alike. Others come back
    as they are, in RGB.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("RGB")
    values = np.nan_to_num(np.asarray(picture), posinf=MAX_VALUE, neginf=-MAX_VALUE)
    values = values.astype(np.float64)
    low, high = np.percentile(values, PERCENTILES)
    stretched = (values - low) / max(high - low, 1e-12)
    return Image.fromarray((255 * stretched.clip(0, 1)).round().astype(np.uint8))


def read_image(path: Path) -> np.ndarray:
    """A picture as it was trained on: turned as EXIF has it, and of 8 bits.

    Returns:
        uint8 of shape (H, W, 3), RGB.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return np.asarray(
            to_eight_bits(decode_image(read_image_bytes(path)).upright).convert("RGB")
        )
    except (OSError, ValueError) as error:
        shown = printable(str(path), 1000)
        raise InputError(f"{shown} cannot be read as a picture: {error}") from None
