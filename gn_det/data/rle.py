"""Check COCO's run-length encoding (RLE), since pycocotools does not validate it."""

from typing import Any

import pycocotools.mask as coco_mask

from .findings import Findings

# Maximum number of characters per run, of five bits each; more would overflow pycocotools' 32 bits
MAX_LETTERS = 6


def clean_rle(
    shown: object, mask: dict, size: tuple[int, int], findings: Findings
) -> dict[str, Any] | None:
    """Check and clean a mask in RLE.

    Args:
        shown: id of the annotation, for findings.
        mask: the `segmentation`, with compressed or plain `counts`.
        size: (height, width) of the image in pixels.
        findings: collects the findings.

    Returns:
        compressed RLE of the given size, or None if the mask is unusable.
    """
    given, counts = mask.get("size"), mask.get("counts")
    if not isinstance(given, list) or given != list(size):
        action = "size must be the image's height and width"
        findings.add("RLE masks whose size differs from their image", shown, action, fatal=True)
        return None
    runs = runs_of(counts, size[0] * size[1])
    if runs is None:
        action = "encode them again with pycocotools.mask.encode"
        findings.add("RLE masks whose counts are invalid", shown, action, fatal=True)
        return None
    if not sum(runs[1::2]):
        findings.add("masks without area", shown, "their objects are skipped")
        return None
    joined = join_runs(runs)
    if joined != runs or not isinstance(counts, str):
        mask = coco_mask.frPyObjects({"size": list(size), "counts": joined}, *size)
        counts = mask["counts"].decode("ascii")
    # Not `given`, which may have True or 1.0 for 1; pycocotools rejects both
    return {"size": list(size), "counts": counts}


def runs_of(counts: object, pixels: int) -> list[int] | None:
    """Check and decode `counts` of RLE.

    Args:
        counts: COCO's compressed string, or a list of run lengths.
        pixels: number of pixels of the image, below 2**29; the runs must cover all of them.

    Returns:
        the lengths of alternating runs of 0 and 1, or None if pycocotools cannot read `counts`
        safely.
    """
    runs = decode_runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int for run in runs):
        return None
    if not all(0 <= run <= pixels for run in runs) or sum(runs) != pixels:
        return None
    return runs


def decode_runs(counts: str) -> list[int] | None:
    """Decode COCO's compressed string to run lengths; None if it is malformed."""
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
        # From the fourth run on, the difference to the run two places before is stored
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            return None
        value = letters = 0
    return None if letters else runs


def join_runs(runs: list[int]) -> list[int]:
    """Merge runs around runs of length 0; only the first run may be 0, as the format requires."""
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
