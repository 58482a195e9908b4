"""A COCO-format data set of one's own, looked at and made ready to be trained on.

What is trained on is a cleaned copy of the annotation file. Pictures stay where they are, but for
those that Detectron2 would misread. A copy is registered by its own path, so that a config which
names it in DATASETS is complete.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import InputError
from ..files import write_whole
from .annotations import clean_objects, inspect_counts, inspect_ids, read_instances
from .findings import Finding, Findings, refuse
from .picture_files import copy_picture, inspect_pictures, missing_pictures
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
    pictures = list(inspect_pictures(content["images"], source.images, found))
    entries = [entry for entry, *_ in pictures]
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in entries}
    objects = list(clean_objects(content["annotations"], sizes, found))
    content = {"categories": content["categories"], "images": entries, "annotations": objects}
    inspect_counts(content, found)
    digests, copies = [digest for _, digest, _ in pictures], [copy for *_, copy in pictures]
    return Cleaned(source.images, content, list(found), digests, copies)


def survey(source: Source) -> list[Finding]:
    """What there is to notice in a data set without reading its pictures.

    Raises:
        InputError: if the annotation file cannot be read, or is no such file.
    """
    content, found = read_instances(source.annotations), Findings()
    inspect_ids(content, found)
    if any(finding.stops for finding in found):
        return list(found)
    missing_pictures(content["images"], source.images, found)
    sizes = {}
    for image in content["images"]:
        if all(isinstance(image.get(side), int) for side in ("width", "height")):
            sizes[image["id"]] = image["width"], image["height"]
        else:
            then = "give them, in pixels"
            found.add("pictures without width and height", image["file_name"], then, stops=True)
    objects = list(clean_objects(content["annotations"], sizes, found))
    inspect_counts({**content, "annotations": objects}, found)
    return list(found)


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
        findings = [] if wanted else data.findings
        halves.append(Cleaned(data.images, content, findings, digests, copies))
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
    if masks and any("segmentation" in a for a in real):
        for annotation in real:
            if "segmentation" not in annotation:
                then = "give them one, or train boxes alone with MODEL.MASK_ON False"
                found.add("objects without a mask, others having one", annotation["id"], then, True)
    for name, data in (("training", train), ("validation", val)):
        if all(a["iscrowd"] for a in data.content["annotations"]):
            found.add("sets without any object", name, "annotate some", stops=True)
    return list(found)


@dataclass(frozen=True)
class Prepared:
    """Two data sets that were looked at and written.

    Args:
        train: the path of an annotation file, which is also the name of its data set.
        val: the same, for validation.
        findings: what was noticed, in words, by "train", "val" and "both".
    """

    train: str
    val: str
    findings: dict[str, list[str]]


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
    if any(finding.stops for finding in first.findings):
        return first, first, {"train": first.findings}
    if val is None:
        first, second = divide(first, val_fraction, group_by)
    else:
        second = clean(val)
        if any(finding.stops for finding in second.findings):
            return first, second, {"train": first.findings, "val": second.findings}
    both = compare_splits(first, second, masks)
    return first, second, {"train": first.findings, "val": second.findings, "both": both}


def prepare(
    train: Source, val: Source | None, folder: Path, *, going_on: bool = False, **options: Any
) -> Prepared:
    """Look at training and validation set, and write what training needs into `folder`.

    What was written from the same files by the same options is taken as it is.

    Args:
        going_on: whether something has been trained on what `folder` holds.
        options: those of `look`.

    Raises:
        InputError: for files that cannot be read, findings that stop, and a `folder` that is gone
            on from and holds other data.
    """
    record = folder / "prepared.json"
    mark = fingerprint([source for source in (train, val) if source], options)
    names = {split: str((folder / f"{split}.json").resolve()) for split in ("train", "val")}
    if record.is_file():
        before = json.loads(record.read_text())
        if before["fingerprint"] == mark:
            return Prepared(**names, findings=before["findings"])
        if going_on:
            raise InputError(
                f"{folder} was made from other annotations, pictures or options: name another "
                "output folder, or remove it"
            )
    first, second, found = look(train, val, **options)
    refuse(found)
    masks = options.get("masks", True)
    for data, path in ((first, names["train"]), (second, names["val"])):
        write(data, Path(path), masks)
    told = {name: [str(finding) for finding in findings] for name, findings in found.items()}
    with write_whole(record) as file:
        file.write(json.dumps({"fingerprint": mark, "findings": told}, indent=1) + "\n")
    return Prepared(**names, findings=told)


def fingerprint(sources: Iterable[Source], options: dict[str, Any]) -> str:
    """Tells whether annotations, pictures and options are those of an earlier time.

    Pictures are compared by name, size and time of change.
    """
    digest = sha256(json.dumps(options, sort_keys=True).encode())
    for source in sources:
        content = read_instances(source.annotations)
        digest.update(f"{source.images.resolve()}\n{json.dumps(content)}\n".encode())
        for entry in content["images"]:
            path = source.images / str(entry.get("file_name"))
            if path.is_file():
                state = path.stat()
                digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# What the files of `write` start with
MARK = '{"info": {"description": "prepared by gn_det"'


def write(data: Cleaned, path: Path, masks: bool) -> None:
    """Write a data set's annotation file, and the copies of pictures that it needs beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for entry, digest, how in zip(data.content["images"], data.digests, data.copies, strict=True):
        picture = (data.images / entry["file_name"]).resolve()
        if how:
            source, picture = picture, path.parent.resolve() / "pictures" / f"{digest[:32]}.png"
            if not picture.is_file():
                copy_picture(source, picture, how)
        entries.append({**entry, "file_name": str(picture), "listed_as": entry["file_name"]})
    objects = data.content["annotations"]
    if not masks:
        objects = [{k: v for k, v in a.items() if k != "segmentation"} for a in objects]
    content = {"images": entries, "annotations": objects, "categories": data.content["categories"]}
    with write_whole(path) as file:
        file.write(f"{MARK}}}, {json.dumps(content)[1:]}\n")


def register(names: Sequence[str]) -> None:
    """Register the data sets among `names` that are paths of files written by `prepare`.

    Raises:
        InputError: for another annotation file.
    """
    for name in names:
        if not name.endswith(".json") or name in DatasetCatalog.list() or not Path(name).is_file():
            continue
        with open(name, encoding="utf-8") as file:
            if file.read(len(MARK)) != MARK:
                raise InputError(
                    f"DATASETS names {name}, which has not been looked at: give it with --train or "
                    "--val and the folder of its pictures"
                )
        # The pictures' own paths are whole
        register_coco_instances(name, {}, name, "")


def keys_of(prepared: Prepared, cfg: CfgNode) -> dict[str, Any]:
    """The config keys that follow from a data set, whatever the recipe.

    Args:
        cfg: tells whether masks are wanted.
    """
    content = json.loads(Path(prepared.train).read_text())
    real = [a for a in content["annotations"] if not a["iscrowd"]]
    masks = [a["segmentation"] for a in real if "segmentation" in a]
    keys: dict[str, Any] = {
        "DATASETS.TRAIN": (prepared.train,),
        "DATASETS.TEST": (prepared.val,),
        "MODEL.ROI_HEADS.NUM_CLASSES": len(content["categories"]),
        "MODEL.MASK_ON": cfg.MODEL.MASK_ON and bool(masks),
    }
    if any(isinstance(mask, dict) for mask in masks):
        # Detectron2's polygons cannot hold RLE
        keys["INPUT.MASK_FORMAT"] = "bitmask"
    return keys
