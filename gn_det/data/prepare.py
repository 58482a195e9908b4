"""A COCO-format data set of one's own, made ready to be trained on.

What is trained on is a cleaned copy of the annotation file. Pictures stay where they are, but for
those that Detectron2 would misread. A copy is registered by its own path, so that a config which
names it in DATASETS is complete.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import InputError
from ..files import open_regular, write_whole
from .annotations import read_instances
from .clean import Cleaned, Source, look
from .findings import refuse
from .image_files import copy_image
from .json_files import MAX_BYTES
from .masks import box_mask


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
    mark = fingerprint([source for source in (train, val) if source], folder, options)
    names = {split: str((folder / f"{split}.json").resolve()) for split in ("train", "val")}
    whole = all(map(is_prepared, names.values()))
    if record.is_file() and whole:
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
    told = {name: [str(finding) for finding in findings] for name, findings in found.items()}
    masks = options.get("masks", True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        for data, path in ((first, names["train"]), (second, names["val"])):
            write(data, Path(path), masks)
        # Last, since it says that the others are there
        with write_whole(record) as file:
            file.write(json.dumps({"fingerprint": mark, "findings": told}, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return Prepared(**names, findings=told)


def fingerprint(sources: Iterable[Source], folder: Path, options: dict[str, Any]) -> str:
    """Tells whether annotations, pictures and options are those of an earlier time.

    Pictures are compared by name and size.

    Args:
        folder: that copies of pictures lie in, by their whole paths.

    Raises:
        InputError: for files that cannot be read.
    """
    digest = sha256(json.dumps([str(folder.resolve()), options], sort_keys=True).encode())
    for source in sources:
        content = read_instances(source.annotations)
        try:
            text = json.dumps(content)
        except RecursionError:
            why = "lists within lists are nested too deeply"
            raise InputError(f"{source.annotations} is no COCO instances file: {why}") from None
        # A folder may have a name that UTF-8 has no bytes for
        images = os.path.realpath(source.images).encode(errors="surrogateescape")
        digest.update(images + f"\n{text}\n".encode())
        for entry in content["images"]:
            try:
                size = os.path.getsize(source.images / str(entry.get("file_name")))
            except (OSError, ValueError):
                size = -1  # is found out later
            digest.update(f"{size}\n".encode())
    return digest.hexdigest()


# What the files of `write` start with
MARK = '{"info": {"description": "prepared by gn_det"'


def write(data: Cleaned, path: Path, masks: bool) -> None:
    """Write a data set's annotation file, and the copies of pictures that it needs beside it.

    Args:
        masks: whether masks are wanted, if there are any.

    Raises:
        InputError: for a file in its place that is not of this function.
    """
    if path.exists() and not is_prepared(path):
        raise InputError(f"{path} is yours, and would be overwritten: name another output folder")
    entries = []
    for entry, digest, how in zip(data.content["images"], data.digests, data.copies, strict=True):
        picture = (data.images / entry["file_name"]).resolve()
        if how:
            source, picture = picture, path.parent.resolve() / "pictures" / f"{digest[:32]}.png"
            if not picture.is_file():
                copy_image(source, picture, how)
        entries.append({**entry, "file_name": str(picture), "listed_as": entry["file_name"]})
    objects = data.content["annotations"]
    if masks and any("segmentation" in a and not a["iscrowd"] for a in objects):
        # Detectron2's evaluation of masks wants one of crowds, too
        objects = [{"segmentation": box_mask(a["bbox"]), **a} for a in objects]
    else:
        objects = [{k: v for k, v in a.items() if k != "segmentation"} for a in objects]
    content = {"images": entries, "annotations": objects, "categories": data.content["categories"]}
    with write_whole(path) as file:
        file.write(f"{MARK}}}, {json.dumps(content)[1:]}\n")


def is_prepared(path: str | Path) -> bool:
    """Whether a file was written by `write`."""
    try:
        with open_regular(path, MAX_BYTES) as file:
            return file.read(len(MARK)) == MARK.encode()
    except OSError:
        return False


def register(names: Sequence[str]) -> None:
    """Register the data sets among `names` that are paths of files written by `prepare`.

    Raises:
        InputError: for another annotation file.
    """
    for name in names:
        if not name.endswith(".json") or name in DatasetCatalog.list() or not Path(name).is_file():
            continue
        if not is_prepared(name):
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

    Raises:
        InputError: for a model that a set of boxes and masks cannot be given to by these keys.
    """
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN" or cfg.MODEL.KEYPOINT_ON:
        what = "keypoints" if cfg.MODEL.KEYPOINT_ON else cfg.MODEL.META_ARCHITECTURE
        raise InputError(
            f"--train is for Faster and Mask R-CNN, and this config is for {what}: "
            "register the data set in Detectron2's catalog, and name it in DATASETS"
        )
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
