"""Check datasets that are registered in Detectron2's catalogs, and are read as they are."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..config import classes_key, value_of
from ..errors import InputError
from ..files import open_regular
from .clean import Source
from .coco import check_dataset, check_same_classes, class_names
from .findings import Finding, raise_if_fatal
from .image_files import MISSING, UNREADABLE
from .inspect_source import inspect_content, inspect_source
from .json_files import MAX_BYTES

# Detectron2's own names of COCO, whose files are large and known to be right
PUBLISHED = ("coco_2014_", "coco_2017_", "keypoints_coco_")
# What a function of the user, and records in another format, may raise
RECORD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)


def check_datasets(cfg: CfgNode, train: bool = True) -> list[str]:
    """Check the datasets of a config before they are used.

    Args:
        cfg: a detector's config.
        train: whether the training sets are used, or only the test sets.

    Returns:
        one line for each finding that does not prevent the run.

    Raises:
        InputError: for a dataset that is missing, does not fit the model, or would corrupt training
            or evaluation.
    """
    used = datasets_of(cfg, train)
    key = classes_key(cfg)
    classes: Any = value_of(cfg, key) if key else None
    for name in used:
        check_dataset(name, classes, annotated=train)
    check_same_classes({f"dataset {name}": class_names(name) for name in used})
    lines = []
    for name, split in used.items():
        findings = inspect_registered(name, cfg, split)
        raise_if_fatal({name: findings})
        lines += [f"{name}: {finding}" for finding in findings]
    return lines


def log_findings(cfg: CfgNode) -> None:
    """Log what `check_datasets` returns, and raise what it raises."""
    for line in check_datasets(cfg):
        logging.getLogger(__name__).warning(line)


def datasets_of(cfg: CfgNode, train: bool = True) -> dict[str, str]:
    """The datasets of a config.

    Args:
        cfg: the config.
        train: whether to include the training sets.

    Returns:
        {name: "train", "val", or "" for a dataset that is both}.
    """
    splits = {"train": cfg.DATASETS.TRAIN if train else (), "val": cfg.DATASETS.TEST}
    used: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            used[name] = split if used.get(name, split) == split else ""
    return used


def digests_of(names: Iterable[str]) -> dict[str, str]:
    """{name: hash of its annotation file} for the datasets that have one."""
    paths = {name: MetadataCatalog.get(name).get("json_file") for name in names}
    return {
        name: _digest(path, os.stat(path).st_mtime_ns)
        for name, path in paths.items()
        if path and os.path.isfile(path)
    }


@cache
def _digest(path: str, changed: int) -> str:
    digest = sha256()
    with open_regular(path, MAX_BYTES) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def inspect_registered(name: str, cfg: CfgNode, split: str) -> list[Finding]:
    """Check the annotations of a registered dataset; only the start of each image file is read.

    Datasets without instance annotations, those of another evaluator than COCO's, COCO's own,
    those with rotated boxes, and those that `prepare` has checked already have no findings.

    Args:
        name: of a registered dataset.
        cfg: `MODEL.MASK_ON` and `INPUT.MASK_FORMAT` decide which masks can be used, and
            `SOLVER.SKIP_BAD_BATCHES` whether image files may be missing or damaged.
        split: "train" or "val" if the dataset is used for only one of them.

    Raises:
        InputError: if the dataset cannot be read, or is not a COCO instances file.
    """
    metadata = MetadataCatalog.get(name)
    path = Path(metadata.get("json_file") or "")
    changed = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else (0, 0)
    if (
        name.startswith(PUBLISHED)
        or str(path) == name
        or metadata.get("evaluator_type", "coco") != "coco"
        or cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN"  # its boxes have an angle
    ):
        return []
    is_rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    mask_format = cfg.INPUT.MASK_FORMAT if is_rcnn and cfg.MODEL.MASK_ON else ""
    found = _inspect(name, DatasetCatalog[name], changed, split, mask_format)
    if cfg.SOLVER.SKIP_BAD_BATCHES <= 0 or split == "val":
        return list(found)
    kept = "batches with them are skipped, up to SOLVER.SKIP_BAD_BATCHES"
    return [
        replace(f, action=kept, fatal=False) if f.description in (MISSING, UNREADABLE) else f
        for f in found
    ]


@cache
def _inspect(
    name: str, reader: object, changed: tuple[int, int], split: str, mask_format: str
) -> tuple[Finding, ...]:
    """The findings; `reader` and `changed` are only there to read a changed dataset anew."""
    metadata = MetadataCatalog.get(name)
    if path := metadata.get("json_file"):
        source = Source(Path(path), Path(metadata.get("image_root") or ""))
        return tuple(inspect_source(source, split, mask_format))
    return tuple(inspect_content(_from_records(name), Path(), split, mask_format, False))


def _from_records(name: str) -> dict[str, Any]:
    """A COCO instances file's content for a dataset whose function returns Detectron2's records.

    Raises:
        InputError: if the records are not in Detectron2's format.
    """
    try:
        records = DatasetCatalog.get(name)
        names = MetadataCatalog.get(name).get("thing_classes")
        # A record may be listed repeatedly, to draw its image more often
        unique = list({record["file_name"]: record for record in records}.values())
        images, objects = [], []
        for number, record in enumerate(unique, start=1):
            keys = {key: record.get(key) for key in ("file_name", "width", "height")}
            images.append({"id": number, **keys, "file_name": str(record["file_name"])})
            objects += [_from_object(number, given) for given in record.get("annotations", [])]
        ids = range(len(names)) if names else sorted({o["category_id"] for o in objects})
        categories = [{"id": i, "name": str(names[i]) if names else f"class {i}"} for i in ids]
        for number, annotation in enumerate(objects, start=1):
            annotation["id"] = number
    except RECORD_ERRORS as error:
        raise InputError(
            f"dataset {name}: its function does not return records in Detectron2's dataset format: "
            f"{type(error).__name__}: {error}"
        ) from None
    return {"images": images, "annotations": objects, "categories": categories}


def _from_object(image: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """An annotation of COCO's format for one in a record of Detectron2's."""
    values = [float(value) for value in given["bbox"]]
    box = list(BoxMode.convert(values, given["bbox_mode"], BoxMode.XYWH_ABS))
    keys = {"image_id": image, "category_id": given["category_id"], "bbox": box}
    mask = given.get("segmentation")
    if isinstance(mask, dict) and isinstance(mask.get("counts"), bytes):
        mask = {**mask, "counts": mask["counts"].decode("ascii")}
    if isinstance(mask, list):
        mask = [polygon.tolist() if hasattr(polygon, "tolist") else polygon for polygon in mask]
    return {**keys, "iscrowd": given.get("iscrowd", 0), "segmentation": mask}
