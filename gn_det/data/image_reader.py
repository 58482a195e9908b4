"""Decode image files safely: a few formats only, with a one-sentence error otherwise."""

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..errors import InputError, printable
from ..files import open_regular, read_regular

# Pillow's names of the formats of photographs, scans and screenshots. JPEG includes MPO, which many
# phones write. Other formats are excluded, since Pillow selects the decoder by content, not by file
# name, and starts Ghostscript for EPS
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Enough for an uncompressed image of MAX_PIXELS with four channels
MAX_BYTES = 1 << 30
# Pillow's own limit. It is below 2**29, so that run lengths of masks fit into pycocotools' 32 bits
MAX_PIXELS = 178_956_970
# Resizing longer images would give an empty shorter side or a huge longer side
MAX_ASPECT = 500
# Exceptions that Pillow raises on damaged files
READ_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
ORIENTATION = 0x0112  # EXIF tag
# Operation that makes an image upright, by EXIF orientation
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
    """A decoded image file.

    Args:
        upright: the image, with EXIF's orientation applied.
        orientation: EXIF's orientation in the file, 1 to 8; 1 means upright.
        deep: "grey" or "colour" for more than 8 bits per channel, else "".
        format: Pillow's name of the format.
        several: whether the file has more pages or frames than the first, which is used.
    """

    upright: Image.Image
    orientation: int
    deep: str
    format: str
    several: bool


def read_image_bytes(path: Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        OSError: if it cannot be read, is not a regular file, or is larger than `MAX_BYTES`.
    """
    return read_regular(path, MAX_BYTES)


def decode_image(content: bytes) -> Decoded:
    """Decode the bytes of an image file.

    Raises:
        InputError: if it cannot be decoded; the message is the reason, without a file name.
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            if reason := size_error(*file.size):
                raise InputError(reason)
            # Before load(), in which Pillow rotates TIFF images and drops the tag
            deep, orientation = _depth(file), _orientation(file)
            file.load()
            remaining = _orientation(file)
            upright = file.transpose(TURNS[remaining]) if remaining in TURNS else file.copy()
            # The other images of a camera's MPO file are previews
            several = file.format != "MPO" and getattr(file, "n_frames", 1) > 1
            return Decoded(upright, orientation, deep, file.format or "", several)
    except UnidentifiedImageError:
        # Pillow's own message is only the address of the BytesIO object
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise InputError(f"not an image in the format {formats}") from None
    except Exception as error:
        # On damaged files, Pillow's decoders may raise any exception
        raise InputError(printable(str(error) or type(error).__name__)) from None


def size_error(width: int, height: int) -> str:
    """The reason why images of a size are unsupported, or "" if they are supported."""
    if min(width, height) < 1:
        return "it has no pixels"
    if width * height > MAX_PIXELS:
        return f"it has more than {MAX_PIXELS:,} pixels"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"one side is over {MAX_ASPECT} times as long as the other"
    return ""


def _orientation(file: Image.Image) -> int:
    """EXIF's orientation; 1 if it is missing or damaged, as in Detectron2."""
    try:
        value = file.getexif().get(ORIENTATION)
        return value if value in TURNS else 1
    except Exception:
        return 1


def _depth(file: Image.Image) -> str:
    """The value of `Decoded.deep` for an image that is not loaded yet."""
    if file.mode.startswith(("I", "F")):
        return "grey"
    deep = False
    if file.format == "PNG":
        # Pillow silently drops the lower 8 bits of 16-bit colour channels
        deep = any(str(tile[3]).endswith(";16B") for tile in file.tile)  # type: ignore[attr-defined]
    elif file.format == "TIFF":
        bits = file.tag_v2.get(258, 8)  # type: ignore[attr-defined]
        deep = max(bits if isinstance(bits, tuple) else (bits,)) > 8
    return "colour" if deep else ""


def starts_as_image(path: Path) -> bool:
    """Whether a file starts with the signature of one of `FORMATS`; the rest is not read.

    Raises:
        OSError: as `read_image_bytes`.
    """
    with open_regular(path, MAX_BYTES) as file:
        start = file.read(16)
    Image.init()
    tests = (Image.OPEN[name][1] for name in FORMATS)
    return any(test is not None and test(start) for test in tests)
