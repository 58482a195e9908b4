"""A COCO instances file, looked at entry by entry, and brought to what training relies on."""

import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .findings import Findings
from .json_files import read_json
from .masks import Mask, area_of, bounds_of, clean_mask, is_number, length_of

# COCO's evaluation counts no more detections in a picture
CAP = 100
LEFT_OUT = "they are left out"
WITHOUT_OBJECTS = {"train": "they are not learned", "val": "their AP is not measured"}
# Of all objects, that may look as if boxes were meant in another way before a training is stopped
TOLERATED = 0.05
# Of a mask's length in sides of its box: pycocotools takes 1 GB to draw it 28 pixels wide
MAX_ENLARGED = 200_000


def read_instances(path: Path) -> dict[str, Any]:
    """The content of a COCO instances file.

    Raises:
        InputError: if it cannot be read, or is no such file.
    """
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InputError(f"{path} has no list of {key}: it must be a COCO instances file")
    return content


def inspect_ids(content: Mapping[str, list[dict]], found: Findings) -> None:
    """Ids and names that are missing, used twice, or point nowhere.

    The annotations' own ids do not count: `clean_objects` gives them new ones.

    Args:
        content: of a COCO instances file.
        found: what is noticed goes in here.
    """
    for key in ("images", "categories"):
        for number, count in Counter(_hashable(entry.get("id")) for entry in content[key]).items():
            if count > 1 or not _is_id(number):
                then = "give each its own whole number"
                found.add(f"ids of {key} that are missing, no number or twice", number, then, True)
    for key, field in (("images", "file_name"), ("categories", "name")):
        names = [e.get(field) if _is_name(e.get(field)) else None for e in content[key]]
        for name, count in Counter(names).items():
            if count > 1 or name is None:
                then = "give each its own text"
                found.add(f"{field}s of {key} that are missing, no text or twice", name, then, True)
    pictures = {_hashable(image.get("id")) for image in content["images"]}
    categories = {_hashable(category.get("id")) for category in content["categories"]}
    for annotation in content["annotations"]:
        number = annotation.get("id")
        if _hashable(annotation.get("image_id")) not in pictures:
            then = "fix image_id, or take them out"
            found.add("annotations of pictures that are not listed", number, then, True)
        if _hashable(annotation.get("category_id")) not in categories:
            then = "list their category, or take them out"
            found.add("annotations of unknown categories", number, then, True)


def inspect_annotation_ids(annotations: Sequence[dict], found: Findings) -> None:
    """Ids that Detectron2 refuses, or that pycocotools takes for "nothing found".

    Args:
        annotations: that are used with the ids that they have.
        found: what is noticed goes in here.
    """
    for number, count in Counter(_hashable(a.get("id")) for a in annotations).items():
        if count > 1 or not _is_id(number) or number < 1:  # type: ignore[operator]
            what = "ids of annotations that are missing, below 1, no number or twice"
            then = "number them from 1, or give the file with --train or --val, which does"
            found.add(what, number, then, True)


def _hashable(value: object) -> object:
    """What an id is counted by; a list may be nested deeper than `repr` can follow."""
    return value if type(value) in (int, str) else reprlib.repr(value)


def _is_id(value: object) -> bool:
    """Whether a value is a whole number of 64 bits; pycocotools sorts ids as such."""
    return type(value) is int and -(2**63) <= value < 2**63


def _is_name(value: object) -> bool:
    """Whether a value is a text that a file can be called."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        return bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def clean_objects(
    annotations: Sequence[dict], sizes: Mapping[int, tuple[int, int]], found: Findings
) -> Iterator[dict[str, Any]]:
    """The objects that can be trained on, with every key that training and evaluation read.

    Args:
        annotations: of a COCO instances file whose ids are in order.
        sizes: (width, height) in pixels by image id; objects of other images are left out.
        found: what is noticed goes in here.

    Yields:
        annotations, numbered from 1, with `bbox` inside the picture, `area` and `iscrowd`, and
        `segmentation` if there is one.
    """
    tiny, apart = [], []
    for number, annotation in enumerate(annotations, start=1):
        if annotation["image_id"] not in sizes:
            continue
        width, height = sizes[annotation["image_id"]]
        shown = annotation.get("id", f"the {number}th")
        box = clean_box(annotation, shown, width, height, found)
        if box is None:
            continue
        crowd = int(annotation.get("iscrowd") in (1, True) or annotation.get("ignore") in (1, True))
        keys = {key: annotation[key] for key in ("image_id", "category_id")}
        cleaned = {"id": number, **keys, "bbox": box, "iscrowd": crowd, "area": box[2] * box[3]}
        if min(box[2:]) < 1:
            tiny.append(shown)
        if mask := annotation.get("segmentation"):
            mask = clean_mask(shown, mask, (height, width), found)
            if mask is None or not (crowd or _can_be_cropped(shown, mask, box, found)):
                continue
            if not crowd and _overlap(annotation["bbox"], bounds_of(mask)) < 0.5:
                apart.append(shown)
            area: Any = annotation.get("area")
            known = is_number(area) and area > 0
            cleaned["area"] = area if known else area_of(mask, height, width)
            cleaned["segmentation"] = mask
        yield cleaned
    then = "boxes are x, y, width and height in pixels"
    for what, numbers in (
        ("boxes of less than one pixel", tiny),
        ("boxes that are not around their masks", apart),
    ):
        for shown in numbers:
            found.add(what, shown, then, stops=len(numbers) > TOLERATED * len(annotations))


def clean_box(
    annotation: dict, shown: object, width: int, height: int, found: Findings
) -> tuple[float, float, float, float] | None:
    """x, y, width and height in pixels, cut at the picture's border; None if nothing is left."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        then = "give x, y, width and height in pixels"
        found.add("annotations without a box of four numbers", shown, then, stops=True)
        return None
    x, y, w, h = box
    if w <= 0 or h <= 0:
        found.add("empty boxes", shown, LEFT_OUT)
        return None
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        then = "fix them: boxes are x, y, width and height in pixels of the picture"
        found.add("boxes outside their picture", shown, then, stops=True)
        return None
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    # Many tools count the last pixel in or out
    if max(left - x, top - y, x + w - right, y + h - bottom) > 1:
        found.add("boxes that leave their picture", shown, "they are cut at its border")
    if right <= left or bottom <= top:
        # Less wide than the numbers there are at its place
        found.add("empty boxes", shown, LEFT_OUT)
        return None
    return left, top, right - left, bottom - top


def _can_be_cropped(
    shown: object, mask: Mask, box: tuple[float, float, float, float], found: Findings
) -> bool:
    """Whether Detectron2 can draw a mask's polygons at the scale that its box has in training.

    There boxes of any size become 28 pixels wide and high, those below 0.1 counting as 0.1.
    """
    if length_of(mask) <= MAX_ENLARGED * max(min(box[2:]), 0.1):
        return True
    then = "fix their boxes, which are far too small, or the masks"
    found.add("masks that are long beside their boxes", shown, then, stops=True)
    return False


def _overlap(one: Sequence[float], two: Sequence[float]) -> float:
    """Intersection over union of two boxes, x, y, width and height."""
    width = min(one[0] + one[2], two[0] + two[2]) - max(one[0], two[0])
    height = min(one[1] + one[3], two[1] + two[3]) - max(one[1], two[1])
    common = max(width, 0) * max(height, 0)
    union = one[2] * one[3] + two[2] * two[3] - common
    return common / union if union > 0 else 0


def inspect_counts(content: Mapping[str, list[dict]], found: Findings, split: str = "") -> None:
    """Report images with no objects or too many, and categories without any.

    Args:
        content: of a COCO instances file, its objects cleaned.
        split: "train" or "val" where the file is used for one of them alone.
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
            then = WITHOUT_OBJECTS.get(split, "they are neither learned nor measured here")
            found.add("categories without objects", category["name"], then)
