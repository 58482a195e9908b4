"""Run lengths as COCO writes them, read here before pycocotools, which trusts what it is given."""

from typing import Any

import pycocotools.mask as coco_mask

from .findings import Findings

# Of five bits each; pycocotools moves them in 32 bits, and more would be lost
MAX_LETTERS = 6


def clean_rle(
    shown: object, mask: dict, size: tuple[int, int], found: Findings
) -> dict[str, Any] | None:
    """Compressed RLE of an image's size; None if the object has to be left out.

    Args:
        shown: what the object is known by.
        mask: a `segmentation`.
        size: (height, width) of the image in pixels.
        found: what is noticed goes in here.
    """
    given, counts = mask.get("size"), mask.get("counts")
    if not isinstance(given, list) or given != list(size):
        then = "RLE has to be of the picture's height and width"
        found.add("masks of another size than their picture", shown, then, stops=True)
        return None
    runs = runs_of(counts, size[0] * size[1])
    if runs is None:
        then = "write them again with pycocotools.mask.encode"
        found.add("masks that are no RLE of their picture", shown, then, stops=True)
        return None
    if not sum(runs[1::2]):
        found.add("masks without area", shown, "they are left out")
        return None
    joined = join_runs(runs)
    if joined != runs or not isinstance(counts, str):
        mask = coco_mask.frPyObjects({"size": list(size), "counts": joined}, *size)
        counts = mask["counts"].decode("ascii")
    # The image's own numbers: True and 1.0 are equal to 1, but pycocotools refuses them
    return {"size": list(size), "counts": counts}


def runs_of(counts: object, pixels: int) -> list[int] | None:
    """Lengths of the runs of 0 and 1 in turn, or None if pycocotools could not read them safely.

    Args:
        counts: COCO's compressed text, or a list of the lengths.
        pixels: of the image, that the runs have to cover, fewer than 2**29.
    """
    runs = decode_runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int for run in runs):
        return None
    if not all(0 <= run <= pixels for run in runs) or sum(runs) != pixels:
        return None
    return runs


def decode_runs(counts: str) -> list[int] | None:
    """The numbers in COCO's compressed text, None if it is malformed."""
    runs: list[int] = []
    value = letters = 0
    for letter in counts:
        code = ord(letter) - 48
        if not 0 <= code < 64 or letters == MAX_LETTERS:
            return None
        value |= (code & 31) << 5 * letters
        letters += 1
        if code & 32:
            continue
        if code & 16:
            value -= 1 << 5 * letters
        # From the fourth on a run is written as its difference to the one before the last
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            return None
        value = letters = 0
    return None if letters else runs


def join_runs(runs: list[int]) -> list[int]:
    """The same pixels without runs of length 0, but for the first, which is part of the format."""
    joined = runs[:1]
    continues = False
    for run in runs[1:]:
        if continues:
            joined[-1] += run
            continues = False
        elif run == 0:
            continues = True
        else:
            joined.append(run)
    return joined
