"""What a COCO-format annotation file must hold before a run may start."""

import json

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import InputError


def count_categories(name: str) -> int | None:
    """Number of categories of a registered data set, None if nothing on this machine tells it."""
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    if "thing_classes" in metadata.as_dict():
        return len(metadata.thing_classes)
    try:
        with open(metadata.get("json_file", ""), encoding="utf-8") as file:
            return len(json.load(file)["categories"])
    except (OSError, ValueError, KeyError, TypeError):
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
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(
            f"data set {name}: cannot read {path} ({error.strerror}); "
            "is DETECTRON2_DATASETS the folder that holds your data sets?"
        ) from None
    except ValueError as error:
        raise InputError(f"data set {name}: {path} is not JSON ({error})") from None
    for key in ("images", "categories", *(("annotations",) if annotated else ())):
        if not isinstance(content, dict) or not content.get(key):
            raise InputError(
                f"data set {name}: {path} holds no {key}: it must be a COCO instances file"
            )
    if num_classes is not None and len(content["categories"]) != num_classes:
        raise InputError(
            f"data set {name} has {len(content['categories'])} categories, but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: make them equal"
        )
