"""Prepare a custom COCO-format dataset for training.

Training uses a cleaned copy of the annotation file. Images are not copied, except those that
Detectron2 would misread. The cleaned file is registered as a dataset under its own path, so that a
config only needs that path in `DATASETS`.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import InputError
from ..files import open_regular, write_whole
from .annotations import inspect_counts, read_instances
from .clean import Cleaned, Source, clean, clean_splits
from .findings import Findings, raise_if_fatal
from .image_files import copy_image
from .json_files import MAX_BYTES
from .masks import box_mask


@dataclass(frozen=True)
class Prepared:
    """A prepared training and validation set.

    Args:
        train: path of the training annotations, which is also the name of the dataset.
        val: the same for validation.
        findings: the printed findings by "train", "val" and "both".
    """

    train: str
    val: str
    findings: dict[str, list[str]]


def prepare(
    train: Source, val: Source | None, folder: Path, *, resume: bool = False, **options: Any
) -> Prepared:
    """Check a training and a validation set, and write their cleaned copies to `folder`.

    If `folder` already has the copies of the same files, made with the same options, they are kept.

    Args:
        train: the training set.
        val: the validation set, or None to split it off the training set.
        folder: the output folder.
        resume: whether a model was already trained on the data in `folder`; replacing them is then
            an error.
        options: keyword arguments of `clean_splits`.

    Raises:
        InputError: if a file cannot be read or written, a finding is fatal, or `resume` is set and
            `folder` has copies of other data.
    """
    record = folder / "prepared.json"
    current = fingerprint([source for source in (train, val) if source], folder, options)
    names = {split: str((folder / f"{split}.json").resolve()) for split in ("train", "val")}
    complete = all(map(is_prepared, names.values()))
    if record.is_file() and complete:
        before = json.loads(record.read_text())
        if before["fingerprint"] == current:
            return Prepared(**names, findings=before["findings"])
        if resume:
            raise InputError(
                f"{folder} was prepared from other annotations, images or options: use another "
                "output folder, or remove it"
            )
    first, second, findings = clean_splits(train, val, **options)
    raise_if_fatal(findings)
    lines = {name: [str(finding) for finding in listed] for name, listed in findings.items()}
    masks = options.get("masks", True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        for data, path in ((first, names["train"]), (second, names["val"])):
            write(data, Path(path), masks)
        # Written last, since it marks the folder as complete
        with write_whole(record) as file:
            file.write(json.dumps({"fingerprint": current, "findings": lines}, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return Prepared(**names, findings=lines)


def prepare_test(source: Source, folder: Path, masks: bool) -> tuple[str, list[str]]:
    """Check a dataset on which a trained model is evaluated, and write its cleaned copy.

    Args:
        source: the dataset.
        folder: the output folder; the copy's name is a hash of the dataset.
        masks: whether the model has a mask head (`MODEL.MASK_ON`).

    Returns:
        the path of the copy, which is also the name of the dataset, and the printed findings.

    Raises:
        InputError: if a file cannot be read or written, or a finding is fatal.
    """
    cleaned, counted = clean(source), Findings()
    raise_if_fatal({"val": cleaned.findings})
    inspect_counts(cleaned.content, counted, "val")
    digest = fingerprint([source], folder, {"masks": masks})
    path = folder.resolve() / f"test_{digest[:12]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(cleaned, path, masks)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return str(path), [str(finding) for finding in (*cleaned.findings, *counted)]


def fingerprint(sources: Iterable[Source], folder: Path, options: dict[str, Any]) -> str:
    """Compute a hash that changes with the annotations, the images, the options and the folder.

    Images enter by name and file size only.

    Args:
        sources: the datasets.
        folder: the output folder, whose absolute path the copies contain.
        options: keyword arguments of `clean_splits`.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        InputError: if an annotation file cannot be read.
    """
    digest = sha256(json.dumps([str(folder.resolve()), options], sort_keys=True).encode())
    for source in sources:
        content = read_instances(source.annotations)
        try:
            text = json.dumps(content)
        except RecursionError:
            reason = "it is nested too deeply"
            raise InputError(
                f"{source.annotations} is not a COCO instances file: {reason}"
            ) from None
        # Folder names may contain bytes that are not UTF-8
        images = os.path.realpath(source.images).encode(errors="surrogateescape")
        digest.update(images + f"\n{text}\n".encode())
        for entry in content["images"]:
            try:
                size = os.path.getsize(source.images / str(entry.get("file_name")))
            except (OSError, ValueError):
                size = -1  # the checks of `clean_splits` report it
            digest.update(f"{size}\n".encode())
    return digest.hexdigest()


# First bytes of the files that `write` creates
MARK = '{"info": {"description": "prepared by gn_det"'


def write(data: Cleaned, path: Path, masks: bool) -> None:
    """Write a dataset's annotation file, and the necessary copies of images next to it.

    Args:
        data: the cleaned dataset.
        path: path of the annotation file; image copies go to the folder `images` next to it.
        masks: whether to write masks, if the dataset has any.

    Raises:
        InputError: if another file, not created by this function, exists at `path`.
        OSError: if a file cannot be written.
    """
    if path.exists() and not is_prepared(path):
        raise InputError(f"{path} was not written by gn_det: use another output folder, to keep it")
    entries = []
    for entry, digest, how in zip(data.content["images"], data.digests, data.copies, strict=True):
        image = (data.images / entry["file_name"]).resolve()
        if how:
            source, image = image, path.parent.resolve() / "images" / f"{digest[:32]}.png"
            if not image.is_file():
                copy_image(source, image, how)
        entries.append({**entry, "file_name": str(image), "listed_as": entry["file_name"]})
    objects = data.content["annotations"]
    if masks and any("segmentation" in a and not a["iscrowd"] for a in objects):
        # Detectron2's mask evaluation needs masks of crowds, too
        objects = [{"segmentation": box_mask(a["bbox"]), **a} for a in objects]
    else:
        objects = [{k: v for k, v in a.items() if k != "segmentation"} for a in objects]
    content = {"images": entries, "annotations": objects, "categories": data.content["categories"]}
    with write_whole(path) as file:
        file.write(f"{MARK}}}, {json.dumps(content)[1:]}\n")


def is_prepared(path: str | Path) -> bool:
    """Whether a file was created by `write`, judged by its first bytes."""
    try:
        with open_regular(path, MAX_BYTES) as file:
            return file.read(len(MARK)) == MARK.encode()
    except OSError:
        return False


def register(names: Sequence[str]) -> None:
    """Register datasets whose names are paths of annotation files written by `prepare`.

    Args:
        names: names from `DATASETS`; names that are not paths of JSON files are ignored.

    Raises:
        InputError: if a name is the path of another annotation file.
    """
    for name in names:
        if not name.endswith(".json") or name in DatasetCatalog.list() or not Path(name).is_file():
            continue
        if not is_prepared(name):
            raise InputError(
                f"DATASETS names {name}, which gn_det has not checked: pass it with --train or "
                "--val, together with its image folder"
            )
        # No image root, since the file has absolute paths
        register_coco_instances(name, {}, name, "")


def keys_of(prepared: Prepared, cfg: CfgNode) -> dict[str, Any]:
    """Derive the config keys that a prepared dataset determines.

    Args:
        prepared: the dataset.
        cfg: the config of the model; `MODEL.MASK_ON` stays False where it is False.

    Returns:
        values of `DATASETS.TRAIN`, `DATASETS.TEST`, `MODEL.ROI_HEADS.NUM_CLASSES`, `MODEL.MASK_ON`
        and, for RLE masks, `INPUT.MASK_FORMAT`.

    Raises:
        InputError: if the model is not a Faster or Mask R-CNN.
    """
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN" or cfg.MODEL.KEYPOINT_ON:
        model = "keypoints" if cfg.MODEL.KEYPOINT_ON else cfg.MODEL.META_ARCHITECTURE
        raise InputError(
            f"--train is for Faster and Mask R-CNN, and this config is for {model}: "
            "register the dataset in Detectron2's catalog, and name it in DATASETS"
        )
    content = json.loads(Path(prepared.train).read_text())
    masks = _masks(content)
    keys: dict[str, Any] = {
        "DATASETS.TRAIN": (prepared.train,),
        "DATASETS.TEST": (prepared.val,),
        "MODEL.ROI_HEADS.NUM_CLASSES": len(content["categories"]),
        "MODEL.MASK_ON": cfg.MODEL.MASK_ON and bool(masks),
    }
    if any(isinstance(mask, dict) for mask in masks):
        # Detectron2's default format, polygons, cannot represent RLE
        keys["INPUT.MASK_FORMAT"] = "bitmask"
    return keys


def evaluation_keys(path: str, cfg: CfgNode) -> dict[str, Any]:
    """The config keys for evaluating a model on a dataset of `prepare_test`.

    Args:
        path: of the copy.
        cfg: the config of the model.
    """
    masks = _masks(json.loads(Path(path).read_text()))
    return {"DATASETS.TEST": (path,), "MODEL.MASK_ON": cfg.MODEL.MASK_ON and bool(masks)}


def _masks(content: Mapping[str, Any]) -> list[Any]:
    """The masks of all objects that are not crowds."""
    objects = content["annotations"]
    return [a["segmentation"] for a in objects if "segmentation" in a and not a["iscrowd"]]
