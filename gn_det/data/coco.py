"""Checks of registered COCO-format datasets before a run starts."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import InputError, printable
from .json_files import read_json

ENCODING = "utf-8"  # Detectron2 cannot read a byte order mark


def count_categories(name: str) -> int | None:
    """Number of categories of a registered dataset, or None if it is not known on this machine.

    The metadata's `thing_classes` take precedence over the annotation file.
    """
    names = class_names(name)
    return None if names is None else len(names)


def class_names(name: str) -> list[str] | None:
    """Names of the categories of a registered dataset, in the order of the model's class indices.

    The metadata's `thing_classes` take precedence over the annotation file.

    Returns:
        the names, or None if they are not known on this machine.
    """
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    if "thing_classes" in metadata.as_dict():
        return list(metadata.thing_classes)
    try:
        categories = read_json(Path(metadata.get("json_file", "")), ENCODING)["categories"]
        # As in Detectron2, which sorts by id
        return [str(c["name"]) for c in sorted(categories, key=lambda c: c["id"])]
    except (InputError, KeyError, TypeError):
        return None


def check_same_classes(names: Mapping[str, Sequence[str] | None]) -> None:
    """Refuse datasets whose class indices mean different categories.

    Args:
        names: {what they belong to, such as "dataset mine_val": names of the classes, or None if
            they are unknown}.

    Raises:
        InputError: naming the first class that differs.
    """
    known = [(where, classes) for where, classes in names.items() if classes is not None]
    for where, classes in known[1:]:
        first, expected = known[0]
        pairs = enumerate(zip_longest(expected, classes, fillvalue="no class"))
        for index, (one, two) in pairs:
            if one != two:
                raise InputError(
                    f"class {index} is {printable(one)} in {first}, but {printable(two)} in "
                    f"{where}: use the same categories, with ids in the same order"
                )


def check_dataset(name: str, num_classes: int | None = None, annotated: bool = True) -> None:
    """Check that a registered dataset's annotation file fits the model.

    Datasets that were not registered from a COCO JSON file are not checked.

    Args:
        name: name in Detectron2's catalogs.
        num_classes: number of categories of the model, or None to skip that check.
        annotated: whether annotations are required; COCO's test-dev has none.

    Raises:
        InputError: if no dataset has that name, or its file is missing, is not JSON, has no
            images, categories or annotations, or not `num_classes` categories.
    """
    if name not in DatasetCatalog.list():
        raise InputError(
            f"no dataset is registered as {name}: change DATASETS.TRAIN or DATASETS.TEST"
        )
    path = MetadataCatalog.get(name).get("json_file")
    if path is None:
        return
    try:
        content = read_json(Path(path), ENCODING)
    except InputError as error:
        hint = "check that DETECTRON2_DATASETS is the folder of your datasets"
        raise InputError(f"dataset {name}: {error}; {hint}") from None
    for key in ("images", "categories", *(("annotations",) if annotated else ())):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise InputError(
                f"dataset {name}: {path} has no {key}; it must be a COCO instances file"
            )
    if num_classes is not None and len(content["categories"]) != num_classes:
        raise InputError(
            f"dataset {name} has {len(content['categories'])} categories, but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: make them equal"
        )


def remove_converted_annotations(cfg: CfgNode) -> None:
    """Remove ground truth that an earlier run converted to COCO's format.

    Detectron2's evaluator converts a dataset that is registered without a JSON file, and would use
    the old file after the dataset has changed.
    """
    for name in cfg.DATASETS.TEST:
        folder = Path(cfg.OUTPUT_DIR) / "inference"
        (folder / f"{name}_coco_format.json").unlink(missing_ok=True)
