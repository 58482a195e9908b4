"""Check and clean the annotations of a COCO instances file."""

import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .findings import Findings
from .json_files import read_json
from .masks import Mask, area_of, bounds_of, clean_mask, is_number, length_of
from .suspicious import is_crowd, is_other_unit, plain_mask

# COCO's evaluation uses at most this many detections per image
MAX_DETECTIONS = 100
SKIPPED = "they are skipped"
NO_QUOTES = "write them as numbers, without quotes"
UNUSED_CATEGORY = {"train": "they are not learned", "val": "their AP is not measured"}
# If more than this share of the boxes look wrong, their format is probably not x, y, width, height
MAX_SUSPICIOUS = 0.05
# Maximum outline length of a mask, in sides of its box. Detectron2 draws masks 28 pixels wide, and
# at this length pycocotools takes 1 GB for that
MAX_RELATIVE_LENGTH = 200_000


def read_instances(path: Path, annotated: bool = True) -> dict[str, Any]:
    """Read a COCO instances file.

    Args:
        path: the file.
        annotated: whether it must have "annotations".

    Returns:
        the JSON content, in which "images", "annotations" and "categories" are lists of dicts.

    Raises:
        InputError: if it cannot be read, or is not a COCO instances file.
    """
    content = read_json(path)
    if not annotated and isinstance(content, dict):
        content.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InputError(f"{path} has no list of {key}: it must be a COCO instances file")
    return content


def inspect_ids(content: Mapping[str, list[dict]], findings: Findings) -> None:
    """Find missing, duplicate or dangling ids and names.

    Annotation ids are not checked, since `clean_objects` renumbers annotations.

    Args:
        content: the content of a COCO instances file.
        findings: collects the findings.
    """
    for key in ("images", "categories"):
        for number, count in Counter(_hashable(entry.get("id")) for entry in content[key]).items():
            if isinstance(number, str) and number.isdecimal():
                findings.add(f"ids of {key} that are text", number, NO_QUOTES, True)
            elif count > 1 or not _is_id(number):
                description = f"ids of {key} that are missing, duplicate or not integers"
                findings.add(description, number, "give each entry its own integer id", True)
    for key, field in (("images", "file_name"), ("categories", "name")):
        names = [e.get(field) if _is_name(e.get(field)) else None for e in content[key]]
        for name, count in Counter(names).items():
            if count > 1 or name is None:
                description = f"{field}s of {key} that are missing, duplicate or invalid"
                findings.add(description, name, f"give each entry its own {field}", True)
    known_as = {"image_id": "images", "category_id": "categories"}
    images = {_hashable(image.get("id")) for image in content["images"]}
    categories = {_hashable(category.get("id")) for category in content["categories"]}
    for annotation in content["annotations"]:
        for field, known, action in (
            ("image_id", images, "fix image_id, or remove them"),
            ("category_id", categories, "add the category, or remove them"),
        ):
            number = annotation.get(field)
            if _hashable(number) in known:
                continue
            kind = f"annotations whose {field} is not in {known_as[field]}"
            if isinstance(number, str) and number.isdecimal():
                kind, action = f"annotations whose {field} is text", NO_QUOTES
            findings.add(kind, annotation.get("id"), action, True)


def inspect_annotation_ids(annotations: Sequence[dict], findings: Findings) -> None:
    """Find annotation ids that Detectron2 rejects, or that pycocotools reads as "no match".

    Args:
        annotations: the annotations of a file that is used unchanged, with its own ids.
        findings: collects the findings.
    """
    for number, count in Counter(_hashable(a.get("id")) for a in annotations).items():
        if count > 1 or not _is_id(number) or number < 1:  # type: ignore[operator]
            description = "ids of annotations that are missing, duplicate, below 1 or not integers"
            action = "number them from 1, or pass the file with --train or --val, which does that"
            findings.add(description, number, action, True)


def _hashable(value: object) -> object:
    """A hashable stand-in for an id; `repr` would fail on deeply nested lists."""
    return value if type(value) in (int, str) else reprlib.repr(value)


def _is_id(value: object) -> bool:
    """Whether a value is an integer of 64 bits, as which pycocotools sorts ids."""
    return type(value) is int and -(2**63) <= value < 2**63


def _is_name(value: object) -> bool:
    """Whether a value is a string that can name a file: not empty, no NUL, valid UTF-8."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        return bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def clean_objects(
    annotations: Sequence[dict], sizes: Mapping[int, tuple[int, int]], findings: Findings
) -> Iterator[dict[str, Any]]:
    """Clean annotations: keep the usable ones, with all keys that training and evaluation read.

    Args:
        annotations: the annotations of a COCO instances file that passed `inspect_ids`.
        sizes: (width, height) in pixels by image id; annotations of other images are skipped.
        findings: collects the findings.

    Yields:
        annotations numbered from 1, with `area`, `iscrowd`, `bbox` clipped to the image, and
        `segmentation` if the annotation has one.
    """
    tiny, mismatched = [], []
    for number, annotation in enumerate(annotations, start=1):
        if annotation["image_id"] not in sizes:
            continue
        width, height = sizes[annotation["image_id"]]
        shown = annotation.get("id", f"the {number}th")
        box = clean_box(annotation, shown, width, height, findings)
        if box is None:
            continue
        crowd = int(is_crowd(annotation))
        keys = {key: annotation[key] for key in ("image_id", "category_id")}
        cleaned = {"id": number, **keys, "bbox": box, "iscrowd": crowd, "area": box[2] * box[3]}
        if min(box[2:]) < 1:
            tiny.append(shown)
        given = annotation.get("segmentation")
        mask = plain_mask(given) if given else None
        if given and mask is None:
            findings.add("polygons without points", shown, "their objects have no mask")
        if mask and mask is not given:
            findings.add("masks with points as pairs", shown, "they are read as x, y")
        if mask:
            mask = clean_mask(shown, mask, (height, width), findings)
            if mask is None or not (crowd or _can_be_cropped(shown, mask, box, findings)):
                continue
            if not crowd and _overlap(annotation["bbox"], bounds_of(mask)) < 0.5:
                mismatched.append(shown)
            area: Any = annotation.get("area")
            measured = area_of(mask, height, width)
            known = is_number(area) and area > 0
            if known and is_other_unit(area, measured):
                known = False
                action = "the area is computed from the mask"
                findings.add("areas that are not those of the masks", shown, action)
            cleaned["area"] = area if known else measured
            cleaned["segmentation"] = mask
        yield cleaned
    action = "boxes must be x, y, width and height in pixels"
    for description, numbers in (
        ("boxes smaller than one pixel", tiny),
        ("boxes that do not match their masks", mismatched),
    ):
        for shown in numbers:
            fatal = len(numbers) > MAX_SUSPICIOUS * len(annotations)
            findings.add(description, shown, action, fatal)


def clean_box(
    annotation: dict, shown: object, width: int, height: int, findings: Findings
) -> tuple[float, float, float, float] | None:
    """Clip an annotation's box to the image.

    Args:
        annotation: a COCO annotation.
        shown: id of the annotation, for findings.
        width: of the image, in pixels.
        height: of the image, in pixels.
        findings: collects the findings.

    Returns:
        x, y, width and height in pixels, or None if the box is unusable.
    """
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        action = "set bbox to x, y, width and height in pixels"
        findings.add("annotations whose bbox is not four numbers", shown, action, fatal=True)
        return None
    x, y, w, h = box
    if w <= 0 or h <= 0:
        findings.add("empty boxes", shown, SKIPPED)
        return None
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        action = "set bbox to x, y, width and height in pixels of the image"
        findings.add("boxes outside their image", shown, action, fatal=True)
        return None
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    # Overhangs of one pixel are common, since tools differ in whether they include the last pixel
    if max(left - x, top - y, x + w - right, y + h - bottom) > 1:
        action = "they are clipped to the image"
        findings.add("boxes that extend beyond their image", shown, action)
    if right <= left or bottom <= top:
        # The width or height is lost in rounding
        findings.add("empty boxes", shown, SKIPPED)
        return None
    return left, top, right - left, bottom - top


def _can_be_cropped(
    shown: object, mask: Mask, box: tuple[float, float, float, float], findings: Findings
) -> bool:
    """Whether a mask's outline is short enough to be drawn at the scale that training uses.

    Detectron2 scales each box to 28 x 28 pixels, and takes sides below 0.1 as 0.1.
    """
    if length_of(mask) <= MAX_RELATIVE_LENGTH * max(min(box[2:]), 0.1):
        return True
    action = "fix the boxes, which are far too small, or the masks"
    findings.add("masks that are far too long for their boxes", shown, action, fatal=True)
    return False


def _overlap(one: Sequence[float], two: Sequence[float]) -> float:
    """Intersection over union of two boxes given as x, y, width and height."""
    width = min(one[0] + one[2], two[0] + two[2]) - max(one[0], two[0])
    height = min(one[1] + one[3], two[1] + two[3]) - max(one[1], two[1])
    common = max(width, 0) * max(height, 0)
    union = one[2] * one[3] + two[2] * two[3] - common
    return common / union if union > 0 else 0


def inspect_counts(content: Mapping[str, list[dict]], findings: Findings, split: str = "") -> None:
    """Find images with no objects or too many, and categories without objects.

    Args:
        content: the content of a COCO instances file, with cleaned annotations.
        findings: collects the findings.
        split: "train" or "val" if the file is used for only one of them.
    """
    real = [a for a in content["annotations"] if not a["iscrowd"]]
    objects = Counter(annotation["image_id"] for annotation in real)
    for image in content["images"]:
        if objects[image["id"]] > MAX_DETECTIONS:
            description = f"images with more than {MAX_DETECTIONS} objects"
            action = f"COCO uses {MAX_DETECTIONS} detections per image, so AP cannot reach 100"
            findings.add(description, image["file_name"], action)
        if not objects[image["id"]]:
            action = "they count in evaluation and are skipped in training unless "
            action += "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
            findings.add("images without objects", image["file_name"], action)
    used = {annotation["category_id"] for annotation in real}
    for category in content["categories"]:
        if category["id"] not in used:
            action = UNUSED_CATEGORY.get(split, "they are neither learned nor measured here")
            findings.add("categories without objects", category["name"], action)
