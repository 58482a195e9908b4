"""A COCO-format data set of one's own, looked at, and mended where that can be done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .annotations import (
    clean_box,
    clean_objects,
    inspect_annotation_ids,
    inspect_counts,
    inspect_ids,
    read_instances,
)
from .findings import Finding, Findings
from .image_files import inspect_images, missing_images
from .image_reader import size_error
from .masks import clean_mask, is_read_as_given
from .split import split


@dataclass(frozen=True)
class Source:
    """A COCO instances file, and the folder that its file names are meant in."""

    annotations: Path
    images: Path


@dataclass
class Cleaned:
    """One data set, ready to be written: its content, and the copies of pictures it needs."""

    images: Path
    content: dict[str, Any]
    findings: list[Finding]
    digests: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


def clean(source: Source) -> Cleaned:
    """Look at a data set, and bring its annotations to what training relies on.

    Raises:
        InputError: if the annotation file cannot be read, or is no such file.
    """
    content, found = read_instances(source.annotations), Findings()
    inspect_ids(content, found)
    if any(finding.stops for finding in found):
        # Nothing that follows could be counted
        return Cleaned(source.images, content, list(found))
    pictures = list(inspect_images(content["images"], source.images, found))
    entries = [entry for entry, *_ in pictures]
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in entries}
    objects = list(clean_objects(content["annotations"], sizes, found))
    content = {"categories": content["categories"], "images": entries, "annotations": objects}
    digests, copies = [digest for _, digest, _ in pictures], [copy for *_, copy in pictures]
    return Cleaned(source.images, content, list(found), digests, copies)


def survey(source: Source, split: str = "") -> list[Finding]:
    """What there is to notice in a data set that is used as it is; of images the start is read.

    Raises:
        InputError: if the annotation file cannot be read, or is no such file.
    """
    content, found = read_instances(source.annotations), Findings()
    inspect_ids(content, found)
    if any(finding.stops for finding in found):
        return list(found)
    inspect_annotation_ids(content["annotations"], found)
    missing_images(content["images"], source.images, found)
    sizes = {}
    for image in content["images"]:
        width, height = sides = image.get("width"), image.get("height")
        if not all(type(side) is int for side in sides):
            then = "give them, in pixels"
            found.add("pictures without width and height", image["file_name"], then, stops=True)
        elif why := size_error(width, height):
            told, then = f"{image['file_name']}: {why}", "fix width and height, or the image"
            found.add("images of a size that cannot be used", told, then, stops=True)
        else:
            sizes[image["id"]] = sides
    objects = list(clean_objects(content["annotations"], sizes, found))
    _inspect_as_given(content["annotations"], sizes, found)
    inspect_counts({**content, "annotations": objects}, found, split)
    return list(found)


def _inspect_as_given(
    annotations: Sequence[dict], sizes: Mapping[int, tuple[int, int]], found: Findings
) -> None:
    """Masks that `clean_objects` changes or leaves out, but that are read if the file is used.

    Args:
        annotations: of a COCO instances file whose ids are in order.
        sizes: (width, height) in pixels by image id; objects of other images are left out.
        found: what is noticed goes in here.
    """
    for number, annotation in enumerate(annotations, start=1):
        mask = annotation.get("segmentation")
        if not mask or annotation["image_id"] not in sizes:
            continue
        width, height = sizes[annotation["image_id"]]
        shown = annotation.get("id", f"the {number}th")
        if not is_read_as_given(mask):
            then = "give the file with --train or --val, which writes them again"
            found.add("masks that Detectron2 cannot read as they are", shown, then, stops=True)
        if clean_box(annotation, shown, width, height, Findings()) is None:
            # Evaluation reads the masks of objects without a box, too
            clean_mask(shown, mask, (height, width), found)


def divide(data: Cleaned, val_fraction: float, group_by: str | None) -> tuple[Cleaned, Cleaned]:
    """Training and validation set of one data set; see `split`."""
    chosen = split(data.content["images"], data.digests, val_fraction, group_by)
    halves = []
    for wanted in (False, True):
        mine = [i for i, validates in enumerate(chosen) if validates == wanted]
        entries = [data.content["images"][i] for i in mine]
        ids = {entry["id"] for entry in entries}
        objects = [a for a in data.content["annotations"] if a["image_id"] in ids]
        content = {**data.content, "images": entries, "annotations": objects}
        digests, copies = [data.digests[i] for i in mine], [data.copies[i] for i in mine]
        halves.append(Cleaned(data.images, content, [], digests, copies))
    halves[0].findings = data.findings
    return halves[0], halves[1]


def compare_splits(train: Cleaned, val: Cleaned, masks: bool) -> list[Finding]:
    """What is wrong between the two, each of them being right in itself.

    Args:
        masks: whether masks are wanted, if there are any.
    """
    found = Findings()
    names = dict(zip(train.digests, (e["file_name"] for e in train.content["images"]), strict=True))
    for digest, entry in zip(val.digests, val.content["images"], strict=True):
        if digest in names:
            one, two = names[digest], entry["file_name"]
            told = one if one == two else f"{one} is {two}"
            found.add("pictures in both sets", told, "take them out of one", stops=True)
    one, two = (
        {c["id"]: c.get("name") for c in data.content["categories"]} for data in (train, val)
    )
    for number in sorted(one.keys() | two.keys()):
        if one.get(number) != two.get(number):
            told = f"{number} is {one.get(number)} and {two.get(number)}"
            found.add("categories that differ", told, "give both sets the same list", stops=True)
    real = [a for data in (train, val) for a in data.content["annotations"] if not a["iscrowd"]]
    learnt, measured = (
        {a["category_id"] for a in data.content["annotations"] if not a["iscrowd"]}
        for data in (train, val)
    )
    for number in sorted(measured - learnt):
        then = "their AP will be 0, and count in the mean"
        found.add("categories with objects in validation alone", one.get(number), then)
    if masks and any("segmentation" in a for a in real):
        for annotation in real:
            if "segmentation" not in annotation:
                then = "give them one, or train boxes alone with MODEL.MASK_ON False"
                found.add("objects without a mask, others having one", annotation["id"], then, True)
    for name, data in (("training", train), ("validation", val)):
        if all(a["iscrowd"] for a in data.content["annotations"]):
            found.add("sets without any object", name, "annotate some", stops=True)
    return list(found)


def look(
    train: Source,
    val: Source | None,
    *,
    val_fraction: float = 0.2,
    group_by: str | None = None,
    masks: bool = True,
) -> tuple[Cleaned, Cleaned, dict[str, list[Finding]]]:
    """Look at training and validation set, without writing anything.

    Args:
        val: None to take `val_fraction` of the training set, as `split` does.
        masks: whether masks are wanted, if there are any.

    Raises:
        InputError: for files that cannot be read, and splits that cannot be made.
    """
    first = clean(train)
    second = clean(val) if val else first
    both = {"train": first.findings} | ({"val": second.findings} if val else {})
    if any(finding.stops for findings in both.values() for finding in findings):
        return first, second, both
    if val is None:
        first, second = divide(first, val_fraction, group_by)
    findings = {}
    for name, data in (("train", first), ("val", second)):
        counted = Findings()
        inspect_counts(data.content, counted, name)
        findings[name] = [*data.findings, *counted]
    return first, second, {**findings, "both": compare_splits(first, second, masks)}
