"""Check and measure COCO masks, polygons or RLE, before pycocotools reads them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from shapely.geometry import Polygon

from .findings import Findings
from .rle import clean_rle

Mask = list[list[float]] | dict[str, Any]

# Maximum length of all outlines of a mask in pixels. pycocotools samples them every 1/5 pixel, and
# takes 1 GB at this length
MAX_LENGTH = 10_000_000
MAX_POINTS = 1_000_000
# Maximum number of polygons times their length, to which the time for merging is proportional
MAX_MERGING = 1_000_000_000
# pycocotools draws with 32-bit integers, and Detectron2 enlarges polygons by up to 5 x 28 / 0.1
MAX_COORDINATE = 500_000
# Self-intersections are only searched up to this many points, since the time may be quadratic
MAX_POINTS_CROSSED = 5_000


def clean_mask(
    shown: object, mask: object, size: tuple[int, int], findings: Findings
) -> Mask | None:
    """Check and clean the `segmentation` of an annotation.

    Args:
        shown: id of the annotation, for findings.
        mask: the `segmentation`.
        size: (height, width) of the image in pixels.
        findings: collects the findings.

    Returns:
        polygons of at least three points each, or compressed RLE, or None if the mask is unusable.
    """
    if isinstance(mask, dict):
        return clean_rle(shown, mask, size, findings)
    polygons: list[Any] = mask if isinstance(mask, list) else [mask]
    if all(map(is_number, polygons)):
        polygons = [polygons]
    if not all(isinstance(p, list) and all(map(is_number, p)) for p in polygons):
        action = "use lists of x1, y1, x2, y2 and so on, or RLE"
        findings.add("masks that are neither polygons nor RLE", shown, action, fatal=True)
        return None
    if not _fits(shown, polygons, size, findings):
        return None
    complete = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
    shapes = [Polygon(list(zip(p[::2], p[1::2], strict=True))) for p in complete]
    # The hull's area, since the signed areas of a self-intersecting polygon may cancel to 0
    kept = [(p, s) for p, s in zip(complete, shapes, strict=True) if s.convex_hull.area > 0]
    if not kept:
        findings.add("masks without area", shown, "their objects are skipped")
        return None
    if len(kept) < len(polygons):
        action = "only their other polygons are used"
        findings.add("masks with polygons without area", shown, action)
    checked = sum(map(len, complete)) <= 2 * MAX_POINTS_CROSSED
    if checked and not all(shape.is_valid for _, shape in kept):
        action = "they are filled by pycocotools' rule"
        findings.add("masks with self-intersecting polygons", shown, action)
    return [p for p, _ in kept]


def is_number(value: object) -> bool:
    """Whether a value is a number below 1e9 in magnitude; excludes bool, infinity and NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e9  # False for NaN


def is_read_as_given(mask: object) -> bool:
    """Whether Detectron2 can read a mask in its present form, without `clean_mask`."""
    if isinstance(mask, dict):
        size = mask.get("size")
        return isinstance(size, list) and all(type(side) is int for side in size)
    return isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)


def _fits(
    shown: object, polygons: list[list[float]], size: tuple[int, int], findings: Findings
) -> bool:
    """Whether polygons are on or near their image, and small enough for pycocotools to draw."""
    height, width = size
    length, points = 0.0, 0
    for polygon in polygons:
        corners = _corners(polygon)
        far = np.abs(corners - (width / 2, height / 2)) > (1.5 * width, 1.5 * height)
        if far.any() or (np.abs(corners) > MAX_COORDINATE).any():
            action = "set polygons to x1, y1, x2, y2 and so on, in pixels of the image"
            findings.add("masks with polygons outside their image", shown, action, fatal=True)
            return False
        length, points = length + _length(corners), points + len(corners)
    longest = min(width * height + 4 * (width + height), MAX_LENGTH)
    if length > longest or points > MAX_POINTS or length * len(polygons) > MAX_MERGING:
        action = "remove points, or use RLE"
        findings.add("masks with too many or too long polygons", shown, action, fatal=True)
        return False
    return True


def _corners(polygon: Sequence[float]) -> np.ndarray:
    """A polygon's points, (N, 2); an unpaired last number is dropped, as in pycocotools."""
    return np.array(polygon[: len(polygon) // 2 * 2], dtype=float).reshape(-1, 2)


def _length(corners: np.ndarray) -> float:
    """Length of a closed polygon in pixels, in the maximum norm, where diagonal steps count 1."""
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1, initial=0).sum())


def length_of(mask: Mask) -> float:
    """Length of all polygons of a mask in pixels, in the maximum norm; 0 for RLE."""
    return 0 if isinstance(mask, dict) else sum(_length(_corners(polygon)) for polygon in mask)


def area_of(mask: Mask, height: int, width: int) -> int:
    """Number of pixels that polygons or compressed RLE cover."""
    if isinstance(mask, list):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
    return int(coco_mask.area(mask))


def bounds_of(mask: Mask) -> tuple[float, float, float, float]:
    """Bounding box of a mask: x, y, width and height in pixels."""
    if isinstance(mask, dict):
        x, y, w, h = (float(value) for value in coco_mask.toBbox(mask))
        return x, y, w, h
    xs = [x for polygon in mask for x in polygon[::2]]
    ys = [y for polygon in mask for y in polygon[1::2]]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def box_mask(box: Sequence[float]) -> list[list[float]]:
    """Convert a box, given as x, y, width and height, to one polygon."""
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]
