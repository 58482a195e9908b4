"""Check custom datasets in COCO format, and fix what can be fixed automatically."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .annotations import clean_objects, inspect_counts, inspect_ids, read_instances
from .findings import Finding, Findings
from .image_files import inspect_images
from .split import split, version_of
from .suspicious import find_copies, inspect_box_format, inspect_crowds

# Difference between the wanted and the reached share of validation images that is reported
MAX_DEVIATION = 0.1


@dataclass(frozen=True)
class Source:
    """A custom dataset: a COCO instances file, and the folder that its file names refer to."""

    annotations: Path
    images: Path


@dataclass
class Cleaned:
    """A cleaned dataset, ready to be written.

    Args:
        images: the image folder.
        content: the content of the cleaned COCO instances file.
        findings: the findings of the checks.
        digests: SHA-256 of each image file, in the order of `content["images"]`.
        copies: for each image, how it must be copied, as `inspect_images` returns it.
    """

    images: Path
    content: dict[str, Any]
    findings: list[Finding]
    digests: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


def clean(source: Source) -> Cleaned:
    """Check a dataset, reading all its images, and clean its annotations.

    If ids are missing, duplicate or dangling, the remaining checks are skipped.

    Raises:
        InputError: if the annotation file cannot be read, or is not a COCO instances file.
    """
    content, findings = read_instances(source.annotations), Findings()
    inspect_ids(content, findings)
    if any(finding.fatal for finding in findings):
        # The other checks rely on ids
        return Cleaned(source.images, content, list(findings))
    images = list(inspect_images(content["images"], source.images, findings))
    entries = [entry for entry, *_ in images]
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in entries}
    annotations = content["annotations"]
    inspect_crowds(annotations, findings)
    inspect_box_format(annotations, sizes, findings)
    copies_of = find_copies(annotations)
    for position in sorted(copies_of):
        shown = annotations[position].get("id")
        findings.add("objects that are listed twice", shown, "the copies are left out")
    kept = [a for position, a in enumerate(annotations) if position not in copies_of]
    objects = list(clean_objects(kept, sizes, findings))
    content = {"categories": content["categories"], "images": entries, "annotations": objects}
    digests, copies = [digest for _, digest, _ in images], [copy for *_, copy in images]
    return Cleaned(source.images, content, list(findings), digests, copies)


def split_dataset(
    data: Cleaned, val_fraction: float, group_by: str | None
) -> tuple[Cleaned, Cleaned]:
    """Divide a dataset into a training and a validation set; see `split` for the arguments.

    The training set gets the findings of the dataset, the validation set gets none.
    """
    chosen = split(data.content["images"], data.digests, val_fraction, group_by)
    share, findings = sum(chosen) / len(chosen), Findings()
    if abs(share - val_fraction) > MAX_DEVIATION:
        description = f"images for validation, {share:.0%} instead of {val_fraction:.0%}"
        for entry, is_val in zip(data.content["images"], chosen, strict=True):
            if is_val:
                action = "the groups are too large or too few: use finer ones, or pass --val"
                findings.add(description, entry["file_name"], action)
    halves = []
    for wanted in (False, True):
        members = [i for i, is_val in enumerate(chosen) if is_val == wanted]
        entries = [data.content["images"][i] for i in members]
        ids = {entry["id"] for entry in entries}
        objects = [a for a in data.content["annotations"] if a["image_id"] in ids]
        content = {**data.content, "images": entries, "annotations": objects}
        digests, copies = [data.digests[i] for i in members], [data.copies[i] for i in members]
        halves.append(Cleaned(data.images, content, [], digests, copies))
    halves[0].findings = [*data.findings, *findings]
    return halves[0], halves[1]


def compare_splits(train: Cleaned, val: Cleaned, masks: bool) -> list[Finding]:
    """Check a training and a validation set for errors that only show when they are compared.

    Args:
        train: the training set.
        val: the validation set.
        masks: whether the model has a mask head (`MODEL.MASK_ON`).
    """
    findings = Findings()
    names = dict(zip(train.digests, (e["file_name"] for e in train.content["images"]), strict=True))
    for digest, entry in zip(val.digests, val.content["images"], strict=True):
        if digest in names:
            one, two = names[digest], entry["file_name"]
            example = one if one == two else f"{one} = {two}"
            findings.add("images in both sets", example, "remove them from one set", fatal=True)
    learned_from, measured_on = (
        {version_of(e["file_name"]): e["file_name"] for e in data.content["images"]}
        for data in (train, val)
    )
    for original in sorted((learned_from.keys() & measured_on.keys()) - {""}):
        example = f"{learned_from[original]}, {measured_on[original]}"
        action = "AP will be too high: move all versions of an image into one set"
        findings.add("images of which both sets have versions", example, action)
    one, two = (
        {c["id"]: c.get("name") for c in data.content["categories"]} for data in (train, val)
    )
    for number in sorted(one.keys() | two.keys()):
        if one.get(number) != two.get(number):
            example = f"id {number}: {one.get(number)} in train, {two.get(number)} in val"
            action = "use the same categories in both sets"
            findings.add("categories that differ between the sets", example, action, fatal=True)
    real = [a for data in (train, val) for a in data.content["annotations"] if not a["iscrowd"]]
    learned, measured = (
        {a["category_id"] for a in data.content["annotations"] if not a["iscrowd"]}
        for data in (train, val)
    )
    for number in sorted(measured - learned):
        action = "their AP will be 0, which lowers the mean"
        findings.add("categories with objects in validation only", one.get(number), action)
    if masks and any("segmentation" in a for a in real):
        for annotation in real:
            if "segmentation" not in annotation:
                description = "objects without a mask, although other objects have one"
                action = "add the masks, or train on boxes only with MODEL.MASK_ON False"
                findings.add(description, annotation["id"], action, fatal=True)
    for name, data in (("training", train), ("validation", val)):
        if all(a["iscrowd"] for a in data.content["annotations"]):
            findings.add("sets without any object", name, "annotate some objects", fatal=True)
    return list(findings)


def clean_splits(
    train: Source,
    val: Source | None,
    *,
    val_fraction: float = 0.2,
    group_by: str | None = None,
    masks: bool = True,
) -> tuple[Cleaned, Cleaned, dict[str, list[Finding]]]:
    """Check and clean a training and a validation set, without writing anything.

    Args:
        train: the training set.
        val: the validation set, or None to split it off the training set.
        val_fraction: share of the training set to split off, as `split` takes it.
        group_by: keeps images of a group together in the split, as `split` takes it.
        masks: whether the model has a mask head (`MODEL.MASK_ON`).

    Returns:
        the training set, the validation set, and the findings by "train", "val" and "both". If
        fatal findings prevent the split, both sets are the training set.

    Raises:
        InputError: if a file cannot be read, or the split is impossible.
    """
    first = clean(train)
    second = clean(val) if val else first
    both = {"train": first.findings} | ({"val": second.findings} if val else {})
    if any(finding.fatal for findings in both.values() for finding in findings):
        return first, second, both
    if val is None:
        first, second = split_dataset(first, val_fraction, group_by)
    findings = {}
    for name, data in (("train", first), ("val", second)):
        counted = Findings()
        inspect_counts(data.content, counted, name)
        findings[name] = [*data.findings, *counted]
    return first, second, {**findings, "both": compare_splits(first, second, masks)}
