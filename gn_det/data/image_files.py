"""Check image files one by one, and copy those that Detectron2 would misread."""

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
from ..progress import progress
from .findings import Findings
from .image_reader import TURNS, decode_image, read_image_bytes, starts_as_image
from .near_names import near_name

# Percentiles of an image's values that become 0 and 255 when it is converted to 8 bits
PERCENTILES = (0.1, 99.9)
# Files per task of a thread that only reads their first bytes; smaller tasks are slower
CHUNK = 500
MISSING, UNREADABLE = "missing images", "unreadable images"
REPLACE = "replace them, or remove them from the annotation file"
MAX_VALUE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ImageInfo:
    """Properties of an image file.

    Args:
        stored: (width, height) in pixels before EXIF's orientation is applied.
        turned: (width, height) in pixels after EXIF's orientation is applied.
        digest: SHA-256 of the file, "" if it cannot be opened.
        orientation: EXIF's orientation, 1 to 8; 1 means upright.
        deep: "grey" or "colour" for more than 8 bits per channel, else "".
        format: Pillow's name of the format.
        several: whether the file has more pages or frames than the first.
        error: the reason why the file is unusable, or "".
    """

    stored: tuple[int, int] = (0, 0)
    turned: tuple[int, int] = (0, 0)
    digest: str = ""
    orientation: int = 1
    deep: str = ""
    format: str = ""
    several: bool = False
    error: str = ""


def examine(path: Path) -> ImageInfo:
    """Read and decode an image file; problems are reported in `ImageInfo.error`."""
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
    return ImageInfo(
        *(stored, turned, digest, image.orientation, image.deep, image.format, image.several)
    )


def missing_images(entries: Sequence[dict[str, Any]], folder: Path, findings: Findings) -> None:
    """Find files that are missing, or whose first bytes are not those of an image.

    This is a fast substitute for `inspect_images`, and takes the same arguments.
    """
    chunks = [entries[i : i + CHUNK] for i in range(0, len(entries), CHUNK)]
    with ThreadPoolExecutor() as pool:
        problems = pool.map(lambda chunk: [_problem_at_start(folder, e) for e in chunk], chunks)
        for entry, problem in zip(entries, chain.from_iterable(problems), strict=True):
            if problem:
                if problem == MISSING:
                    _add_missing(folder, entry["file_name"], findings)
                else:
                    findings.add(problem, entry["file_name"], REPLACE, fatal=True)


def _problem_at_start(folder: Path, entry: dict[str, Any]) -> str:
    """`MISSING`, `UNREADABLE`, or "" for a file that starts like an image."""
    try:
        # Only known formats: Pillow, which Detectron2 calls, starts Ghostscript for EPS
        known = starts_as_image(folder / entry["file_name"])
    except (OSError, ValueError):
        return MISSING
    return "" if known else UNREADABLE


def _add_missing(folder: Path, name: str, findings: Findings) -> None:
    """Report a missing file, with the existing one that its name probably means."""
    near = near_name(folder, name)
    action = f"put them into {folder}, or remove them from the annotation file"
    if near:
        action = "correct file_name in the annotation file"
    findings.add(MISSING, f"{name}, found as {near}" if near else name, action, fatal=True)


def inspect_images(
    entries: Sequence[dict[str, Any]], folder: Path, findings: Findings
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Find files that are missing, damaged, differ from the listed size, or exceed 8 bits.

    Args:
        entries: the `images` of a COCO instances file.
        folder: the folder that `file_name`s are relative to.
        findings: collects the findings.

    Yields:
        for each readable image its entry with `width` and `height`, the SHA-256 of its file, and
        how it must be copied: "" for no copy, "turned" for a copy with EXIF's orientation
        applied, or "as stored" for a copy without it.
    """
    with ThreadPoolExecutor() as pool:
        paths = [folder / entry["file_name"] for entry in entries]
        files = progress(pool.map(examine, paths), f"reading images of {folder}", len(paths))
        for entry, file in zip(entries, files, strict=True):
            name = entry["file_name"]
            if file.error and not file.digest:
                _add_missing(folder, name, findings)
            elif file.error:
                findings.add(UNREADABLE, f"{name}: {file.error}", REPLACE, fatal=True)
            else:
                size, copy = _frame_of(entry, file, findings)
                yield {**entry, "width": size[0], "height": size[1]}, file.digest, copy


def _frame_of(
    entry: dict[str, Any], file: ImageInfo, findings: Findings
) -> tuple[tuple[int, int], str]:
    """Determine the (width, height) that an image's annotations refer to, and its kind of copy.

    The kinds of copy are those of `inspect_images`.
    """
    name, listed = entry["file_name"], (entry.get("width"), entry.get("height"))
    copy = ""
    if file.several:
        findings.add("files with several pages or frames", name, "only the first is used")
    if file.deep == "colour":
        action = "convert them to 8 bits per channel"
        findings.add("colour images with more than 8 bits per channel", name, action, fatal=True)
    elif file.deep:
        low, high = PERCENTILES
        action = f"8-bit copies are used, with percentile {low} as black and {high} as white"
        findings.add("grey images with more than 8 bits", name, action)
        copy = "turned"
    if listed == file.stored != file.turned:
        action = "copies without that rotation are used, which match the annotations"
        findings.add("images whose listed size ignores their EXIF rotation", name, action)
        return file.stored, "as stored"
    if file.orientation != 1:
        action = "it is applied; if the annotations ignore it, remove the tag from the files"
        findings.add("images with an EXIF orientation", name, action)
        if file.format == "TIFF":
            # Pillow applies the orientation of TIFF files itself, and Detectron2 would repeat it
            copy = "turned"
    if listed not in (file.turned, (None, None)):
        shown = "x".join(printable(side) for side in listed)
        example = f"{name}: {file.turned[0]}x{file.turned[1]}, listed as {shown}"
        action = "fix width and height, since boxes may be misplaced"
        findings.add("images whose size differs from the listed size", example, action, fatal=True)
    return file.turned, copy


def copy_image(source: Path, target: Path, how: str) -> None:
    """Write an 8-bit PNG copy of an image, without EXIF tags.

    Args:
        source: the image file.
        target: the path of the copy; missing folders are created.
        how: "turned" to apply EXIF's orientation, "as stored" to ignore it.

    Raises:
        OSError: if the source cannot be read, or the target cannot be written.
        InputError: if the source cannot be decoded.
    """
    decoded = decode_image(read_image_bytes(source))
    image = to_eight_bits(decoded.upright)
    # Orientations 6 and 8 invert each other, all others are their own inverses
    undo = {6: 8, 8: 6}.get(decoded.orientation, decoded.orientation)
    if how == "as stored" and undo in TURNS:
        image = image.transpose(TURNS[undo])
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(target, "wb") as file:
        # Via an array, which drops all tags
        Image.fromarray(np.asarray(image)).save(file, format="PNG")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image to 8 bits per channel.

    Grey images of 16 or 32 bits are scaled between `PERCENTILES` of their own values. Statistics
    of the dataset are not used, so that prediction on a single image gives the same result.

    Returns:
        a greyscale image for modes I and F, else an RGB image.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image), posinf=MAX_VALUE, neginf=-MAX_VALUE)
    values = values.astype(np.float64)
    low, high = np.percentile(values, PERCENTILES)
    stretched = (values - low) / max(high - low, 1e-12)
    return Image.fromarray((255 * stretched.clip(0, 1)).round().astype(np.uint8))


def read_image(path: Path) -> np.ndarray:
    """Read an image as for training: EXIF's orientation applied, and converted to 8 bits.

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
        raise InputError(f"{shown} cannot be read as an image: {error}") from None


class UnreadableImageError(InputError):
    """An image file that cannot be decoded; the message is one sentence, also from a worker."""

    def __init__(self, text: str) -> None:
        # DataLoader re-raises a worker's error with its whole traceback as the text, which ends
        # with the name of this class and the message
        super().__init__(text.strip().rpartition(f"{type(self).__name__}: ")[2])
