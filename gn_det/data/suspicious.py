"""Find annotations that are valid, but whose values probably do not mean what COCO means."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .findings import Findings
from .masks import is_number

# If more than this share of the boxes leave their image, their format may be another one
LEAVING = 0.05
# And if at least this share of all boxes fit as corners, it is x1, y1, x2, y2
AS_CORNERS = 0.98
# Annotations of exporters that mark every object as a crowd have a larger share of crowds
MOSTLY_CROWDS = 0.5
# A given area may differ from that of the mask by this factor, as tools measure differently
AREA_FACTOR = 2.0


def is_crowd(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation marks a region that is neither trained nor measured."""
    return any(annotation.get(key) in (1, True) for key in ("iscrowd", "ignore"))


def inspect_crowds(annotations: Sequence[Mapping[str, Any]], findings: Findings) -> None:
    """Report crowds, and refuse files in which most objects are crowds or `iscrowd` is invalid.

    Args:
        annotations: the annotations of a COCO instances file.
        findings: collects the findings.
    """
    crowds = [a for a in annotations if is_crowd(a)]
    most = len(crowds) > MOSTLY_CROWDS * len(annotations)
    action = "they are neither trained nor counted as objects"
    if most:
        action = "most objects are crowds, which are not trained: set iscrowd to 0"
    for annotation in crowds:
        description = "annotations with iscrowd 1 (or ignore 1)"
        findings.add(description, annotation.get("id"), action, fatal=most)
    for annotation in annotations:
        value = annotation.get("iscrowd")
        if value is not None and value not in (0, 1):
            findings.add(
                *("annotations whose iscrowd is neither 0 nor 1", annotation.get("id")),
                *("set it to 0 for an object, or to 1 for a crowd", True),
            )


def find_copies(annotations: Sequence[Mapping[str, Any]]) -> set[int]:
    """Positions of annotations that repeat an earlier one: same image, category, box and mask."""
    seen, copies = set(), set()
    keys = ("image_id", "category_id", "bbox", "segmentation", "iscrowd")
    for position, annotation in enumerate(annotations):
        key = json.dumps([annotation.get(key) for key in keys], sort_keys=True)
        if key in seen:
            copies.add(position)
        seen.add(key)
    return copies


def inspect_box_format(
    annotations: Sequence[Mapping[str, Any]],
    sizes: Mapping[int, tuple[int, int]],
    findings: Findings,
) -> None:
    """Refuse boxes that fit their images as corners, but not as x, y, width and height.

    Args:
        annotations: the annotations of a COCO instances file that passed `inspect_ids`.
        sizes: (width, height) in pixels by image id.
        findings: collects the findings.
    """
    leaving, corners, total = [], 0, 0
    for annotation in annotations:
        box, size = annotation.get("bbox"), sizes.get(annotation["image_id"])
        if size is None or not isinstance(box, list) or len(box) != 4:
            continue
        if not all(map(is_number, box)):
            continue
        x, y, a, b = box
        total += 1
        if x + a > size[0] + 1 or y + b > size[1] + 1:
            leaving.append(annotation.get("id"))
        corners += x < a <= size[0] + 1 and y < b <= size[1] + 1
    if len(leaving) > LEAVING * total and corners >= AS_CORNERS * total:
        for shown in leaving:
            findings.add(
                *("boxes that look like x1, y1, x2, y2", shown),
                *("set bbox to x, y, width and height in pixels", True),
            )


def plain_mask(mask: object) -> object:
    """A `segmentation` in COCO's form, if it is empty or a list of points as pairs.

    Returns:
        None for polygons without points; flat polygons for `[[x, y], ...]` and for lists of such
        polygons; otherwise `mask` itself.
    """
    if not isinstance(mask, list):
        return mask
    if all(polygon == [] for polygon in mask):
        return None
    if _are_pairs(mask):
        return [_flat(mask)]
    if all(isinstance(polygon, list) and _are_pairs(polygon) for polygon in mask):
        return [_flat(polygon) for polygon in mask]
    return mask


def _are_pairs(points: Sequence[Any]) -> bool:
    pairs = (isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in points)
    return len(points) >= 3 and all(pairs)


def _flat(points: Sequence[Sequence[float]]) -> list[float]:
    return [value for point in points for value in point]


def is_other_unit(given: float, measured: float) -> bool:
    """Whether a given area differs from the mask's by more than `AREA_FACTOR`."""
    # Thin masks cover few pixels, and tools differ in whether they count the outline
    return measured > 16 and not measured / AREA_FACTOR <= given <= measured * AREA_FACTOR
