"""Generate annotations and image files that may crash, hang or mislead their readers.

Each call returns one random case. A reader must accept it, or reject it with one sentence.
"""

import copy
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image

NUMBERS = [
    *(-0.0, -1, 0, 1, True, 0.5, 1e-320, 1e8, -1e8, 4.3e8, 9.9e8, 1e308, 2**31, 2**32, 2**63),
    *(float("nan"), float("inf"), float("-inf"), 10**30, -(10**400), 10**4000, "5", None, []),
]
NAMES = [
    *(
        "a\nerror: forged",
        "\x1b[2J\x1b]0;title\x07",
        "\u202egnp.exe",
        "\ud800",
        "\0",
        "",
        "x" * 5000,
    ),
    *("/dev/zero", "/dev/stdin", "/proc/self/mem", ".", "..", "a/" * 3000, "{0}", "%s", "\r", 7),
]


def nested(depth: int) -> list:
    """Lists within lists."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def hostile_annotations(rng: random.Random, content: dict) -> dict:
    """Damage the content of a valid COCO instances file in one to three random ways."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choice([_mask, _mask, _polygons, _polygons, _box, _ids, _size, _names, _many])(
            rng, content
        )
    return content


def _mask(rng: random.Random, content: dict) -> None:
    """RLE that may be misread, or read beyond the image's end."""
    annotation = rng.choice(content["annotations"])
    size = next(
        ([i["height"], i["width"]] for i in content["images"] if i["id"] == annotation["image_id"]),
        [5, 5],
    )
    try:
        counts: Any = hostile_counts(rng, size[0] * size[1])
    except (TypeError, ValueError, OverflowError):
        counts = "0"  # the image size is invalid already
    if rng.random() < 0.2:
        size = rng.choice([[*map(str, size)], [True, True], size[::-1], size * 2, None])
    annotation["segmentation"] = {"size": size, "counts": counts}
    if rng.random() < 0.5:
        annotation["area"] = rng.choice([100, *NUMBERS])


def hostile_counts(rng: random.Random, pixels: int) -> Any:
    """Run lengths for an image with the given number of pixels, rarely valid ones."""
    letters = "".join(map(chr, range(48, 112)))
    drawn = np.random.default_rng(rng.getrandbits(32)).random((min(pixels, 100_000), 1))
    mask = np.asfortranarray(drawn < rng.random(), dtype=np.uint8)
    valid = coco_mask.encode(mask)["counts"].decode()
    place = rng.randrange(len(valid) + 1)
    kinds: list[Callable[[], Any]] = [
        *([lambda: valid] * 3),
        lambda: valid[:place] + rng.choice(letters) + valid[place + 1 :],
        lambda: valid[:place] + rng.choice(letters) * rng.choice([1, 6, 7, 13]) + valid[place:],
        lambda: valid[:place],
        lambda: valid[:place] + rng.choice("\0ÿ\n\ud800p/٣") + valid[place:],
        lambda: "".join(rng.choice(letters) for _ in range(rng.randrange(40))),
        # A run of the whole image, and differences that overflow 32 bits and return
        lambda: compress([pixels, 0, 0]) + rng.choice(["", "0", "00", "ooooo?ooooo_"]),
        lambda: compress([pixels + rng.choice([2**30, 2**32, 2**64])]),
        lambda: compress([0, 2**31, 2**31, pixels]),
        lambda: compress([0, -1, 1, pixels]),
        # Valid, except for runs of length 0, or characters that pycocotools shifts out of 32 bits
        lambda: compress([pixels - 1, 0, 0, 1]),
        lambda: compress([0, 9, 0, 0, 5, 0, pixels - 14]),
        lambda: compress([pixels - 18, 9, 5, 3, 1], rng.choice([0, 4, 7, 12])),
        lambda: [pixels],
        lambda: [pixels - 1, 0, 0, 1],
        lambda: [0, True, pixels - 1],
        lambda: [float(pixels)],
        lambda: [0, 2**32, pixels],
        lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(5))],
        lambda: [0] * 100_000 + [pixels],
        lambda: nested(rng.choice([1, 500])),
    ]
    return rng.choice(kinds)()


def compress(runs: list[int], padding: int = 0) -> str:
    """Encode run lengths of any size as COCO's string, with superfluous characters per run."""
    text = ""
    for i, run in enumerate(runs):
        value, codes = run - runs[i - 2] if i > 2 else run, []
        while not codes or value != (-1 if codes[-1] & 16 else 0):
            codes.append(value & 31)
            value >>= 5
        codes += [value & 31] * padding
        text += "".join(chr(code + 80) for code in codes[:-1]) + chr(codes[-1] + 48)
    return text


def _polygons(rng: random.Random, content: dict) -> None:
    """Polygons that are huge, long, too many, or malformed."""
    annotation = rng.choice(content["annotations"])
    intact = [[10, 10, 20, 10, 20, 20, 10, 20]]
    far = [rng.choice(NUMBERS[:18]) if rng.random() < 0.4 else 10 for _ in range(8)]
    zigzag = [x for i in range(rng.choice([100, 20_000])) for x in (i % 2 * 30, i * 1e-3)]
    annotation["segmentation"] = rng.choice(
        [
            *([far], [*intact, far], [far[:4]], [[*intact[0], 1e8]], far, [zigzag]),
            *(intact * 20_000, [[]], [[], *intact], nested(500), [intact], "text", {"a": 1}, 5),
            [[*intact[0], rng.choice(NUMBERS), 5]],
            [[1e-320, 0, 0, 1e-320, 0, 0]],
            [[5, 5] * rng.choice([3, 50_000])],
        ]
    )
    if rng.random() < 0.5:
        annotation["area"] = rng.choice([100, *NUMBERS])


def _box(rng: random.Random, content: dict) -> None:
    annotation = rng.choice(content["annotations"])
    box = [*annotation["bbox"], 5, 5, 5, 5][:4]
    box[rng.randrange(4)] = rng.choice(NUMBERS)
    annotation["bbox"] = rng.choice([box, box, box[:3], [10, 10, 1e-300, 1e-300], nested(300)])


def _ids(rng: random.Random, content: dict) -> None:
    """Change an id, either wherever it is used or in one place only."""
    key, field = rng.choice([("images", "image_id"), ("categories", "category_id")])
    entry, new = rng.choice(content[key]), rng.choice([*NUMBERS, nested(300), {"a": []}])
    if rng.random() < 0.5:
        for annotation in content["annotations"]:
            if annotation[field] == entry["id"]:
                annotation[field] = new
    entry["id"] = new
    if rng.random() < 0.3:
        rng.choice(content["annotations"])["id"] = rng.choice([*NUMBERS, *NAMES])


def _size(rng: random.Random, content: dict) -> None:
    image = rng.choice(content["images"])
    image[rng.choice(["width", "height"])] = rng.choice([*NUMBERS, nested(300)])


def _names(rng: random.Random, content: dict) -> None:
    key, field = rng.choice([("images", "file_name"), ("categories", "name")])
    rng.choice(content[key])[field] = rng.choice([*NAMES, *NUMBERS, nested(300)])


def _many(rng: random.Random, content: dict) -> None:
    """Very many entries, crowds only, or invalid values in unused fields."""
    kind = rng.choice(["categories", "annotations", "field", "crowds"])
    if kind == "categories":
        content["categories"] += [{"id": 1000 + i, "name": f"name {i}"} for i in range(50_000)]
    elif kind == "annotations":
        first = content["annotations"][0]
        content["annotations"] += [{**first, "id": 1000 + i} for i in range(2_000)]
    elif kind == "field":
        entry = rng.choice([content, *content["images"], *content["categories"]])
        entry[rng.choice(["info", "\ud800", "\x1b[0m"])] = rng.choice([nested(500), *NAMES])
    else:
        for annotation in content["annotations"]:
            annotation["iscrowd"] = rng.choice([1, *NUMBERS])


def hostile_image(rng: random.Random, folder: Path) -> Path:
    """Create a path with an image suffix: damaged, of another format, or not a regular file."""
    path = folder / f"{rng.getrandbits(64):016x}{rng.choice(['.png', '.jpg', '.tif', '.webp'])}"
    kinds = [_damaged] * 8 + [_no_file, _other_format, _bomb, _odd_exif]
    rng.choice(kinds)(rng, path)
    return path


SUPPORTED = ("BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")


def small_image(rng: random.Random, kind: str) -> bytes:
    """An intact small image of a format, in a random mode, with or without EXIF."""
    noise = np.random.default_rng(rng.getrandbits(32))
    image = Image.fromarray(noise.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = rng.randrange(10), "maker"
    options: dict[str, Any] = {"exif": exif} if rng.random() < 0.5 else {}
    if kind == "TIFF":
        options["compression"] = rng.choice([None, "tiff_lzw", "tiff_deflate", "jpeg"])
    if kind == "JPEG":
        options["progressive"] = rng.random() < 0.5
    file = io.BytesIO()
    try:
        mode = rng.choice(["RGB", "L", "P", "1", "F", "CMYK", "RGBA", "LA"])
        image.convert(mode).save(file, format=kind, **options)
    except (OSError, ValueError, KeyError, RuntimeError):
        # The format does not support the mode or option
        file = io.BytesIO()
        image.save(file, format=kind)
    return file.getvalue()


def damage(content: bytes, rng: random.Random) -> bytes:
    """Change, remove or double a few bytes, mostly in the header."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        end = len(damaged) if rng.random() < 0.5 else min(len(damaged), 200)
        place, length = rng.randrange(end + 1), rng.choice([1, 1, 2, 4, 8, 200])
        part = bytes(damaged[place : place + length])
        new = [rng.randbytes(length), b"\xff" * length, b"\0" * length, b"", part * 2, part[::-1]]
        damaged[place : place + length] = rng.choice(new)
    return bytes(damaged[: rng.randrange(len(damaged) + 1)] if rng.random() < 0.1 else damaged)


def _damaged(rng: random.Random, path: Path) -> None:
    path.write_bytes(damage(small_image(rng, rng.choice(SUPPORTED)), rng))


def _no_file(rng: random.Random, path: Path) -> None:
    kind = rng.choice(["fifo", "folder", "device", "loop", "dangling", "sparse", "empty", "proc"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.write_bytes(b"")
        os.truncate(path, rng.choice([10**5, 3 * 2**30, 2**43]))
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        targets = {"device": "/dev/zero", "loop": path, "dangling": "nowhere"}
        path.symlink_to(targets.get(kind, "/proc/self/status"))


def _other_format(rng: random.Random, path: Path) -> None:
    """A format that Pillow or a browser opens by content; for EPS, Pillow starts Ghostscript."""
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, format="EPS")
    text = [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4\n", b"GIF89a", b"\xff\xd8"]
    avif = b"\0\0\0\x1cftypavif\0\0\0\0mif1avif" + rng.randbytes(200)
    path.write_bytes(rng.choice([eps.getvalue(), avif, b"II*\0", b"BM" + b"\0" * 60, *text]))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file made of chunks, with correct checksums."""
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        content += struct.pack(">I", len(body)) + name + body
        content += struct.pack(">I", zlib.crc32(name + body))
    return content


def header(width: int, height: int, bits: int = 8) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)


def _bomb(rng: random.Random, path: Path) -> None:
    """Small files that decompress to large images, or claim to."""
    zeros = zlib.compress(bytes(30_000_000))
    lines = b"IDAT", zlib.compress(bytes(9 * 8))
    width, height = rng.choice([(2**31 - 1, 2**31 - 1), (0, 5), (100_000, 1), (13_000, 13_000)])
    tiff = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 256, 4, 1, rng.choice([8, 2**32 - 1]))
    tiff += struct.pack("<HHII", rng.choice([257, 258, 273, 700]), 4, 2**32 - 1, 8) + b"\x08\0\0\0"
    path.write_bytes(
        rng.choice(
            [
                png(header(8, 8), (b"iCCP", b"p\0\0" + zeros), lines, (b"IEND", b"")),
                png(header(8, 8), (b"zTXt", b"k\0\0" + zeros), lines, (b"IEND", b"")),
                png(header(width, height), lines, (b"IEND", b"")),
                png(lines, (b"IEND", b"")),
                tiff,
            ]
        )
    )


def _odd_exif(rng: random.Random, path: Path) -> None:
    """A JPEG file with a damaged EXIF block."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x829A] = rng.randrange(1, 9), "maker", 0.5
    tags = bytearray(exif.tobytes())
    tags[rng.randrange(10, len(tags))] = rng.randrange(256)
    Image.new("RGB", (32, 24), (200, 0, 0)).save(path, format="JPEG", exif=bytes(tags))
