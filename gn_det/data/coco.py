"""What a COCO-format annotation file must hold before a run may start."""

from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import InputError
from .json_files import read_json

ENCODING = "utf-8"  # Detectron2 reads no byte order mark


def count_categories(name: str) -> int | None:
    """Number of categories of a registered data set, None if nothing on this machine tells it."""
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    if "thing_classes" in metadata.as_dict():
        return len(metadata.thing_classes)
    try:
        return len(read_json(Path(metadata.get("json_file", "")), ENCODING)["categories"])
    except (InputError, KeyError, TypeError):
        return None


def check_dataset(name: str, num_classes: int | None = None, annotated: bool = True) -> None:
    """Check that a registered data set's annotation file can be used by a model.

    Data sets that are not registered from a COCO JSON file pass unread.

    Args:
        num_classes: number of categories that the model tells apart, None to leave it unchecked.
        annotated: whether annotations are needed; COCO's test-dev has none.

    Raises:
        InputError: if no data set has that name, or its file is missing, is not JSON, holds no
            images or no annotations, or has another number of categories than `num_classes`.
    """
    if name not in DatasetCatalog.list():
        raise InputError(
            f"no data set is registered as {name}; change DATASETS.TRAIN or DATASETS.TEST"
        )
    path = MetadataCatalog.get(name).get("json_file")
    if path is None:
        return
    try:
        content = read_json(Path(path), ENCODING)
    except InputError as error:
        hint = "is DETECTRON2_DATASETS the folder that holds your data sets?"
        raise InputError(f"data set {name}: {error}; {hint}") from None
    for key in ("images", "categories", *(("annotations",) if annotated else ())):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise InputError(
                f"data set {name}: {path} holds no {key}: it must be a COCO instances file"
            )
    if num_classes is not None and len(content["categories"]) != num_classes:
        raise InputError(
            f"data set {name} has {len(content['categories'])} categories, but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: make them equal"
        )
