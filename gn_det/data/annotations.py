"""A COCO instances file, looked at entry by entry, and brought to what training relies on."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from shapely.geometry import Polygon

from ..errors import InputError
from .findings import Findings

# COCO's evaluation counts no more detections in a picture
CAP = 100
LEFT_OUT = "they are left out"


def read_instances(path: Path) -> dict[str, Any]:
    """The content of a COCO instances file.

    Raises:
        InputError: if it cannot be read, or is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InputError(f"{path} has no list of {key}: it must be a COCO instances file")
    return content


def inspect_ids(content: Mapping[str, list[dict]], found: Findings) -> None:
    """Ids that are missing, used twice, or point nowhere.

    Args:
        content: of a COCO instances file.
        found: what is noticed goes in here.
    """
    for key in ("images", "annotations", "categories"):
        for number, count in Counter(_hashable(entry.get("id")) for entry in content[key]).items():
            if count > 1 or type(number) is not int:
                then = "give each its own whole number"
                found.add(f"ids of {key} that are missing, no number or twice", number, then, True)
    for name, count in Counter(str(image.get("file_name")) for image in content["images"]).items():
        if count > 1:
            then = "list each picture once, with all of its objects"
            found.add("file names that are listed more than once", name, then, True)
    pictures = {_hashable(image.get("id")) for image in content["images"]}
    categories = {_hashable(category.get("id")) for category in content["categories"]}
    for annotation in content["annotations"]:
        number = annotation.get("id")
        if _hashable(annotation.get("image_id")) not in pictures:
            then = "mend image_id, or take them out"
            found.add("annotations of pictures that are not listed", number, then, True)
        if _hashable(annotation.get("category_id")) not in categories:
            then = "list their category, or take them out"
            found.add("annotations of unknown categories", number, then, True)


def _hashable(value: object) -> object:
    return value if isinstance(value, int | str) else repr(value)


def clean_objects(
    annotations: Iterable[dict], sizes: Mapping[int, tuple[int, int]], found: Findings
) -> Iterator[dict[str, Any]]:
    """The objects that can be trained on, with every key that training and evaluation read.

    Args:
        annotations: of a COCO instances file whose ids are in order.
        sizes: (width, height) in pixels by image id; objects of other images are left out.
        found: what is noticed goes in here.

    Yields:
        annotations with `bbox` inside the picture, `area` and `iscrowd`, and `segmentation` if
        there is one.
    """
    for annotation in annotations:
        if annotation["image_id"] not in sizes:
            continue
        width, height = sizes[annotation["image_id"]]
        box = clean_box(annotation, width, height, found)
        if box is None:
            continue
        crowd = int(bool(annotation.get("iscrowd") or annotation.get("ignore")))
        keys = ("id", "image_id", "category_id")
        cleaned = {**{key: annotation[key] for key in keys}, "bbox": box, "iscrowd": crowd}
        mask = annotation.get("segmentation")
        if not mask:
            yield cleaned | {"area": box[2] * box[3]}
            continue
        mask = clean_mask(annotation["id"], mask, (height, width), found)
        if mask is None:
            continue
        area = annotation.get("area")
        if not isinstance(area, int | float) or not area > 0:
            area = area_of(mask, height, width)
        yield cleaned | {"segmentation": mask, "area": area}


def clean_box(
    annotation: dict, width: int, height: int, found: Findings
) -> tuple[float, float, float, float] | None:
    """x, y, width and height in pixels, cut at the picture's border; None if nothing is left."""
    number, box = annotation.get("id"), annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        then = "give x, y, width and height in pixels"
        found.add("annotations without a box of four numbers", number, then, stops=True)
        return None
    x, y, w, h = box
    if w <= 0 or h <= 0:
        found.add("empty boxes", number, LEFT_OUT)
        return None
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        then = "mend them: boxes are x, y, width and height in pixels of the picture"
        found.add("boxes outside their picture", number, then, stops=True)
        return None
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    # Many tools count the last pixel in or out
    if max(left - x, top - y, x + w - right, y + h - bottom) > 1:
        found.add("boxes that leave their picture", number, "they are cut at its border")
    return left, top, right - left, bottom - top


def area_of(mask: list | dict, height: int, width: int) -> int:
    """Pixels that polygons or compressed RLE cover."""
    if isinstance(mask, list):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
    return int(coco_mask.area(mask))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def clean_mask(
    number: object, mask: object, size: tuple[int, int], found: Findings
) -> list | dict | None:
    """Polygons of three points or more, or RLE; None if the object has to be left out.

    Args:
        size: (height, width) of the picture in pixels.
    """
    if isinstance(mask, dict):
        return _clean_rle(number, mask, size, found)
    polygons = mask if isinstance(mask, list) else []
    whole = [p for p in polygons if _is_polygon(p)]
    shapes = [Polygon(list(zip(p[::2], p[1::2], strict=True))) for p in whole]
    # The signed areas of one that crosses itself may add up to 0
    kept = [p for p, s in zip(whole, shapes, strict=True) if s.convex_hull.area > 0]
    if not kept:
        found.add("masks without area", number, LEFT_OUT)
        return None
    if len(kept) < len(polygons):
        found.add("masks with polygons without area", number, "their other polygons are used")
    if not all(shape.is_valid for shape in shapes if shape.convex_hull.area > 0):
        then = "they are filled as pycocotools fills them"
        found.add("polygons that cross themselves", number, then)
    return kept


def _is_polygon(points: object) -> bool:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    return all(map(_is_finite, points))


def _clean_rle(
    number: object, mask: dict, size: tuple[int, int], found: Findings
) -> dict[str, Any] | None:
    """Compressed RLE of the picture's size."""
    if list(mask.get("size") or ()) != list(size):
        then = "RLE has to be of the picture's height and width"
        found.add("masks of another size than their picture", number, then, stops=True)
        return None
    counts = mask.get("counts")
    area = None
    if isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts):
        # pycocotools would read past the picture's end
        if sum(counts) == size[0] * size[1]:
            mask = coco_mask.frPyObjects(mask, *size)
            mask["counts"] = mask["counts"].decode("ascii")
            area = coco_mask.area(mask)
    elif isinstance(counts, str) and _length_of_rle(counts) == size[0] * size[1]:
        area = coco_mask.area(mask)
    if area is None:
        then = "write them anew with pycocotools.mask.encode"
        found.add("masks that are no RLE of their picture", number, then, stops=True)
    elif area == 0:
        found.add("masks without area", number, LEFT_OUT)
    return mask if area else None


def _length_of_rle(counts: str) -> int | None:
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


def inspect_counts(content: Mapping[str, list[dict]], found: Findings) -> None:
    """Pictures with no objects or too many, and categories without any.

    Args:
        content: of a COCO instances file, its objects cleaned.
    """
    real = [a for a in content["annotations"] if not a["iscrowd"]]
    objects = Counter(annotation["image_id"] for annotation in real)
    for image in content["images"]:
        if objects[image["id"]] > CAP:
            then = f"COCO's numbers count {CAP} detections a picture: AP cannot reach 100"
            found.add(f"pictures with more than {CAP} objects", image["file_name"], then)
        if not objects[image["id"]]:
            then = "they count when AP is measured; in training they are left out, unless "
            then += "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
            found.add("pictures without objects", image["file_name"], then)
    used = {annotation["category_id"] for annotation in real}
    for category in content["categories"]:
        if category["id"] not in used:
            then = "they are kept, and have no AP"
            found.add("categories without objects", category.get("name"), then)
