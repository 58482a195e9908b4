"""The one way in which gn_det reads image files: few formats, and one sentence if it cannot."""

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..errors import InputError, printable
from ..files import open_regular, read_regular

# Of photographs, scans and screenshots, as Pillow calls them; MPO, of many phones, comes with JPEG.
# Pillow goes by the content, whatever a file is called, and starts Ghostscript for EPS
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# An image of as many pixels as Pillow allows, in four channels, uncompressed, has less
MAX_BYTES = 1 << 30
# Pillow's own limit; below 2**29 the run lengths of masks fit into pycocotools' 32 bits
MAX_PIXELS = 178_956_970
# A longer one would be resized to nothing on its shorter side, or to a huge longer one
MAX_ASPECT = 500
# What Pillow raises on damaged files
READ_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
ORIENTATION = 0x0112  # EXIF's tag
# What EXIF's orientations want done, to see the image upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoded:
    """An image file's content.

    Args:
        upright: the image, turned as EXIF has it.
        orientation: EXIF's, 1 for none.
        deep: "grey" or "colour" if it has more than 8 bits a value, else "".
        format: as Pillow calls it.
    """

    upright: Image.Image
    orientation: int
    deep: str
    format: str


def read_image_bytes(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        OSError: if it cannot be read, is no regular file, or larger than images are.
    """
    return read_regular(path, MAX_BYTES)


def decode_image(content: bytes) -> Decoded:
    """An image from the bytes of its file.

    Raises:
        InputError: if it cannot be decoded; why, without the file's name.
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            if why := size_error(*file.size):
                raise InputError(why)
            # First, because Pillow turns a TIFF when it loads it, and drops the tag
            deep, orientation = _depth(file), _orientation(file)
            file.load()
            left = _orientation(file)
            upright = file.transpose(TURNS[left]) if left in TURNS else file.copy()
            return Decoded(upright, orientation, deep, file.format or "")
    except UnidentifiedImageError:
        # Pillow's own words name the place in memory that it was in
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise InputError(f"no picture in the format {formats}") from None
    except Exception as error:
        # Damage may lead Pillow's decoders to raise anything
        raise InputError(printable(str(error) or type(error).__name__)) from None


def size_error(width: int, height: int) -> str:
    """Why nothing can be done with images of a size, or ""."""
    if min(width, height) < 1:
        return "it has no pixels"
    if width * height > MAX_PIXELS:
        return f"it has more than {MAX_PIXELS:,} pixels"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"one side is over {MAX_ASPECT} times as long as the other"
    return ""


def _orientation(file: Image.Image) -> int:
    """EXIF's orientation; 1 where it is missing or damaged, as Detectron2 has it."""
    try:
        found = file.getexif().get(ORIENTATION)
        return found if found in TURNS else 1
    except Exception:
        return 1


def _depth(file: Image.Image) -> str:
    """Whether an image has more than 8 bits, as `Decoded.deep`."""
    if file.mode.startswith(("I", "F")):
        return "grey"
    deep = False
    if file.format == "PNG":
        # Pillow drops the lower half of colours of 16
        deep = any(str(tile[3]).endswith(";16B") for tile in file.tile)  # type: ignore[attr-defined]
    elif file.format == "TIFF":
        bits = file.tag_v2.get(258, 8)  # type: ignore[attr-defined]
        deep = max(bits if isinstance(bits, tuple) else (bits,)) > 8
    return "colour" if deep else ""


def starts_as_image(path: Path) -> bool:
    """Whether a file's first bytes are those of a format that is read; the rest is not looked at.

    Raises:
        OSError: as `read_image_bytes`.
    """
    with open_regular(path, MAX_BYTES) as file:
        start = file.read(16)
    Image.init()
    tests = (Image.OPEN[name][1] for name in FORMATS)
    return any(test is not None and test(start) for test in tests)
