"""Check annotations that are used as they are, without the cleaning of `clean`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .annotations import (
    MAX_SUSPICIOUS,
    clean_box,
    clean_objects,
    inspect_annotation_ids,
    inspect_counts,
    inspect_ids,
    read_instances,
)
from .clean import Source
from .findings import Finding, Findings
from .image_files import missing_images
from .image_reader import size_error
from .masks import clean_mask, is_read_as_given
from .suspicious import find_copies, inspect_box_format, inspect_crowds

REWRITE = "or pass the file with --train or --val, which does that"
# What `prepare` would fix, by the finding's description: how a file that is read as it is must be
# changed, and whether it must
UNFIXED = {
    "masks with points as pairs": ("write x1, y1, x2, y2 and so on", True),
    "polygons without points": ("remove the key segmentation", True),
    "areas that are not those of the masks": ("correct them for APs, APm and APl", False),
    "boxes that extend beyond their image": ("clip them for a right AP", False),
    "empty boxes": ("they count as objects that are never found: remove them", False),
}


def inspect_source(source: Source, split: str = "", mask_format: str = "") -> list[Finding]:
    """Check a file that is read as it is; only the start of each image file is read.

    Args:
        source: the dataset; without annotations, as in the test sets of challenges, it has no
            findings.
        split: "train" or "val" if the dataset is used for only one of them.
        mask_format: `INPUT.MASK_FORMAT`, or "" for a model without masks.

    Raises:
        InputError: if the annotation file cannot be read, or is not a COCO instances file.
    """
    content = read_instances(source.annotations, annotated=False)
    return inspect_content(content, source.images, split, mask_format, split != "train")


def inspect_content(
    content: Mapping[str, list[dict]], folder: Path, split: str, mask_format: str, by_coco: bool
) -> list[Finding]:
    """Check the content of a COCO instances file; see `inspect_source`.

    Args:
        content: with "images", "annotations" and "categories".
        folder: that file names are relative to.
        split, mask_format: as in `inspect_source`.
        by_coco: whether pycocotools reads the content as it is, too.
    """
    annotations = content["annotations"]
    if not annotations:
        return []
    findings, fixable = Findings(), Findings()
    inspect_ids(content, findings)
    if not any(finding.fatal for finding in findings):
        missing_images(content["images"], folder, findings)
        _inspect_annotations(content, findings, fixable, split)
        _inspect_keys(annotations, findings, by_coco)
        _inspect_masks(annotations, findings, mask_format, split)
    return [*findings, *map(_unfixed, fixable)]


def _unfixed(finding: Finding) -> Finding:
    """A finding as it applies to a file that is read as it is."""
    if finding.description not in UNFIXED:
        return finding
    action, fatal = UNFIXED[finding.description]
    return replace(finding, action=f"{action}, {REWRITE}", fatal=fatal)


def _inspect_annotations(
    content: Mapping[str, list[dict]], findings: Findings, fixable: Findings, split: str
) -> None:
    """The checks that `clean` makes, for a file that passed `inspect_ids`.

    Args:
        content: the content of the file.
        findings: collects findings.
        fixable: collects findings whose action may be that of `clean`.
        split: as in `inspect_counts`.
    """
    annotations = content["annotations"]
    inspect_annotation_ids(annotations, findings)
    sizes: dict[int, Any] = {}
    for image in content["images"]:
        width, height = image.get("width"), image.get("height")
        if type(width) is not int or type(height) is not int:
            action = "add them to images, as integers in pixels"
            findings.add("images without width and height", image["file_name"], action, fatal=True)
        elif reason := size_error(width, height):
            example, action = f"{image['file_name']}: {reason}", "fix width and height, or the file"
            findings.add("images of an unsupported size", example, action, fatal=True)
        else:
            sizes[image["id"]] = width, height
    inspect_crowds(annotations, findings)
    inspect_box_format(annotations, sizes, findings)
    copies = sorted(find_copies(annotations))
    for position in copies:
        action = "they are trained and counted twice: remove the copies"
        fatal = len(copies) > MAX_SUSPICIOUS * len(annotations)
        shown = annotations[position].get("id")
        findings.add("objects that are listed twice", shown, action, fatal)
    objects = list(clean_objects(annotations, sizes, fixable))
    for shown, mask, annotation in _masks(annotations):
        size = sizes.get(annotation["image_id"])
        if mask and size and clean_box(annotation, shown, size[0], size[1], Findings()) is None:
            # Training skips the object, but evaluation reads its mask
            clean_mask(shown, mask, size[::-1], findings)
    inspect_counts({**content, "annotations": objects}, findings, split)


def _inspect_keys(annotations: Sequence[dict], findings: Findings, by_coco: bool) -> None:
    """Find keys without which Detectron2 or pycocotools would fail during the run."""
    for shown, _, annotation in _masks(annotations):
        if annotation.get("ignore") in (1, True):
            action = f"use iscrowd, {REWRITE}"
            findings.add("annotations with ignore 1", shown, action, fatal=True)
        missing = [key for key in ("area", "iscrowd") if key not in annotation]
        if by_coco and missing:
            description = f"annotations without {' and '.join(missing)}"
            findings.add(description, shown, f"add the keys, {REWRITE}", fatal=True)


def _inspect_masks(
    annotations: Sequence[dict], findings: Findings, mask_format: str, split: str
) -> None:
    """Find masks that training or evaluation cannot use in their present form."""
    real = [entry for entry in _masks(annotations) if not entry[2].get("iscrowd")]
    for shown, mask, _ in _masks(annotations):
        if mask and not is_read_as_given(mask):
            action = f"rewrite them, {REWRITE}"
            findings.add("masks that Detectron2 cannot read", shown, action, fatal=True)
    if not mask_format:
        return
    for shown, mask, _ in real:
        if not mask:
            action = "add the masks, or train on boxes only with MODEL.MASK_ON False"
            findings.add("objects without a mask", shown, action, fatal=True)
        if isinstance(mask, dict) and mask_format == "polygon" and split != "val":
            action = "set INPUT.MASK_FORMAT bitmask"
            findings.add("RLE masks, which are no polygons", shown, action, fatal=True)


def _masks(annotations: Sequence[dict]) -> Iterator[tuple[object, Any, dict]]:
    """The id, the mask and all keys of each annotation."""
    for annotation in annotations:
        yield annotation.get("id"), annotation.get("segmentation"), annotation
