"""Masks as COCO writes them, polygons and run lengths, checked before pycocotools reads them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from shapely.geometry import Polygon

from .findings import Findings
from .rle import clean_rle

Mask = list[list[float]] | dict[str, Any]

# pycocotools walks along every polygon in steps of 1/5 pixel, and keeps all of them: at this many
# pixels it takes 1 GB
MAX_LENGTH = 10_000_000
MAX_POINTS = 1_000_000
# Merging takes a time in proportion to an object's polygons times their length
MAX_MERGING = 1_000_000_000
# Detectron2 draws polygons at up to 5 x 28 / 0.1 times their size, in 32 bits
MAX_COORDINATE = 500_000
# Whether more points cross is not looked at; it can take a time that grows with their square
MAX_POINTS_CROSSED = 5_000


def clean_mask(shown: object, mask: object, size: tuple[int, int], found: Findings) -> Mask | None:
    """Polygons of three points or more, or compressed RLE; None if the object has to be left out.

    Args:
        shown: what the object is known by.
        mask: a `segmentation`.
        size: (height, width) of the image in pixels.
        found: what is noticed goes in here.
    """
    if isinstance(mask, dict):
        return clean_rle(shown, mask, size, found)
    polygons: list[Any] = mask if isinstance(mask, list) else [mask]
    if all(map(is_number, polygons)):
        polygons = [polygons]
    if not all(isinstance(p, list) and all(map(is_number, p)) for p in polygons):
        then = "give lists of x1, y1, x2, y2 and so on, or RLE"
        found.add("masks that are neither polygons nor RLE", shown, then, stops=True)
        return None
    if not _fits(shown, polygons, size, found):
        return None
    whole = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
    shapes = [Polygon(list(zip(p[::2], p[1::2], strict=True))) for p in whole]
    # The signed areas of one that crosses itself may add up to 0
    kept = [(p, s) for p, s in zip(whole, shapes, strict=True) if s.convex_hull.area > 0]
    if not kept:
        found.add("masks without area", shown, "they are left out")
        return None
    if len(kept) < len(polygons):
        found.add("masks with polygons without area", shown, "their other polygons are used")
    looked_at = sum(map(len, whole)) <= 2 * MAX_POINTS_CROSSED
    if looked_at and not all(shape.is_valid for _, shape in kept):
        then = "they are filled as pycocotools fills them"
        found.add("polygons that cross themselves", shown, then)
    return [p for p, _ in kept]


def is_number(value: object) -> bool:
    """Whether a value is a number that an image may hold, neither infinite nor huge."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e9  # which is not so for nan


def is_read_as_given(mask: object) -> bool:
    """Whether Detectron2 reads a mask without what `clean_mask` changes of its form."""
    if isinstance(mask, dict):
        size = mask.get("size")
        return isinstance(size, list) and all(type(side) is int for side in size)
    return isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)


def _fits(
    shown: object, polygons: list[list[float]], size: tuple[int, int], found: Findings
) -> bool:
    """Whether polygons are of their image, and no more than pycocotools can draw."""
    height, width = size
    length, points = 0.0, 0
    for polygon in polygons:
        corners = _corners(polygon)
        far = np.abs(corners - (width / 2, height / 2)) > (1.5 * width, 1.5 * height)
        if far.any() or (np.abs(corners) > MAX_COORDINATE).any():
            then = "fix them: polygons are x1, y1, x2, y2 and so on in pixels of the image"
            found.add("polygons outside their image", shown, then, stops=True)
            return False
        length, points = length + _length(corners), points + len(corners)
    longest = min(width * height + 4 * (width + height), MAX_LENGTH)
    if length > longest or points > MAX_POINTS or length * len(polygons) > MAX_MERGING:
        then = "remove points, or give RLE"
        found.add("masks whose polygons are too many or too long", shown, then, stops=True)
        return False
    return True


def _corners(polygon: Sequence[float]) -> np.ndarray:
    """A polygon's points, (N, 2); a number that is left over is dropped, as pycocotools does."""
    return np.array(polygon[: len(polygon) // 2 * 2], dtype=float).reshape(-1, 2)


def _length(corners: np.ndarray) -> float:
    """Steps of a pixel, to the side or across, around a closed polygon."""
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1, initial=0).sum())


def length_of(mask: Mask) -> float:
    """Steps of a pixel around all polygons of a mask, 0 for RLE."""
    return 0 if isinstance(mask, dict) else sum(_length(_corners(polygon)) for polygon in mask)


def area_of(mask: Mask, height: int, width: int) -> int:
    """Pixels that polygons or compressed RLE cover."""
    if isinstance(mask, list):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
    return int(coco_mask.area(mask))


def bounds_of(mask: Mask) -> tuple[float, float, float, float]:
    """x, y, width and height of the box around a mask."""
    if isinstance(mask, dict):
        x, y, w, h = (float(value) for value in coco_mask.toBbox(mask))
        return x, y, w, h
    xs = [x for polygon in mask for x in polygon[::2]]
    ys = [y for polygon in mask for y in polygon[1::2]]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def box_mask(box: Sequence[float]) -> list[list[float]]:
    """A box, x, y, width and height, as a polygon."""
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]
