"""Masks as COCO writes them, polygons and run lengths, checked before pycocotools reads them."""

from collections.abc import Sequence
from typing import Any

import pycocotools.mask as coco_mask
from shapely.geometry import Polygon

from .findings import Findings

Mask = list[list[float]] | dict[str, Any]


def clean_mask(shown: object, mask: object, size: tuple[int, int], found: Findings) -> Mask | None:
    """Polygons of three points or more, or compressed RLE; None if the object has to be left out.

    Args:
        shown: what the object is told by.
        mask: a `segmentation`.
        size: (height, width) of the picture in pixels.
        found: what is noticed goes in here.
    """
    if isinstance(mask, dict):
        return _clean_rle(shown, mask, size, found)
    polygons: list[Any] = mask if isinstance(mask, list) else [mask]
    if all(map(is_number, polygons)):
        polygons = [polygons]
    if not all(isinstance(p, list) and all(map(is_number, p)) for p in polygons):
        then = "give lists of x1, y1, x2, y2 and so on, or RLE"
        found.add("masks that are neither polygons nor RLE", shown, then, stops=True)
        return None
    whole = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
    shapes = [Polygon(list(zip(p[::2], p[1::2], strict=True))) for p in whole]
    # The signed areas of one that crosses itself may add up to 0
    kept = [p for p, s in zip(whole, shapes, strict=True) if s.convex_hull.area > 0]
    if not kept:
        found.add("masks without area", shown, "they are left out")
        return None
    if len(kept) < len(polygons):
        found.add("masks with polygons without area", shown, "their other polygons are used")
    if not all(shape.is_valid for shape in shapes if shape.convex_hull.area > 0):
        then = "they are filled as pycocotools fills them"
        found.add("polygons that cross themselves", shown, then)
    return kept


def is_number(value: object) -> bool:
    """Whether a value is a number that a picture may hold, neither infinite nor huge."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e9  # which is not so for nan


def _clean_rle(
    shown: object, mask: dict, size: tuple[int, int], found: Findings
) -> dict[str, Any] | None:
    """Compressed RLE of the picture's size."""
    given = mask.get("size")
    if not isinstance(given, list) or given != list(size):
        then = "RLE has to be of the picture's height and width"
        found.add("masks of another size than their picture", shown, then, stops=True)
        return None
    counts = mask.get("counts")
    area = None
    if isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts):
        # pycocotools would read past the picture's end
        if sum(counts) == size[0] * size[1]:
            mask = coco_mask.frPyObjects(mask, *size)
            mask["counts"] = mask["counts"].decode("ascii")
            area = coco_mask.area(mask)
    elif isinstance(counts, str) and length_of_rle(counts) == size[0] * size[1]:
        mask = {"size": given, "counts": counts}
        area = coco_mask.area(mask)
    if area is None:
        then = "write them anew with pycocotools.mask.encode"
        found.add("masks that are no RLE of their picture", shown, then, stops=True)
    elif area == 0:
        found.add("masks without area", shown, "they are left out")
    return mask if area else None


def length_of_rle(counts: str) -> int | None:
    """How many pixels COCO's compressed run lengths cover, None if they are malformed."""
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        code = ord(letter) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        # From the fourth on a run is told by its difference to the one before the last
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            return None
        value = shift = 0
    return None if shift else sum(runs)


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
