"""Check datasets that are registered in Detectron2's catalogs, and are read as they are."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import InputError
from ..files import open_regular
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
from .coco import check_dataset, check_same_classes, class_names
from .findings import Finding, Findings, raise_if_fatal
from .image_files import MISSING, UNREADABLE, missing_images
from .image_reader import size_error
from .json_files import MAX_BYTES
from .masks import clean_mask, is_read_as_given
from .suspicious import find_copies, inspect_box_format, inspect_crowds

# Detectron2's own names of COCO, whose files are large and known to be right
PUBLISHED = ("coco_2014_", "coco_2017_", "keypoints_coco_")
# What a function of the user, and records in another format, may raise
RECORD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
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
    is_rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    for name in used:
        # Other architectures have their own key for the number of classes
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES if is_rcnn else None
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
    return tuple(_inspect_content(_from_records(name), Path(), split, mask_format, False))


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
    return _inspect_content(content, source.images, split, mask_format, split != "train")


def _inspect_content(
    content: Mapping[str, list[dict]], folder: Path, split: str, mask_format: str, by_coco: bool
) -> list[Finding]:
    """The findings; `by_coco` says whether pycocotools reads the content as it is."""
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
