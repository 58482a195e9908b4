"""Datasets registered in Python are checked before training, as those of `--train` are."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from conftest import shapes_config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BoxMode

from gn_det.data.registered import check_datasets
from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError

NAME = "own_data_registered"


@pytest.fixture
def registered(content, tmp_path) -> Iterator[Callable[[], CfgNode]]:
    """A function that registers the content, and returns a config for it."""

    def register(*opts: object) -> CfgNode:
        path = tmp_path / "data.json"
        path.write_text(json.dumps(content))
        register_coco_instances(NAME, {}, str(path), str(tmp_path / "images"))
        return config(tmp_path, *opts)

    yield register
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def config(folder: Path, *opts: object) -> CfgNode:
    names = ("DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)")
    return shapes_config(
        *("mask_rcnn_R_18_FPN_gn", *names, "MODEL.ROI_HEADS.NUM_CLASSES", 2),
        *(
            "OUTPUT_DIR",
            folder / "out",
            "INPUT.MASK_FORMAT",
            "polygon",
            "MODEL.BACKBONE.FREEZE_AT",
            0,
            *opts,
        ),
    )


def test_a_right_dataset(registered):
    assert check_datasets(registered()) == []


def as_rle(mask: list[list[float]]) -> dict:
    (rle,) = coco_mask.frPyObjects(mask, 96, 128)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def each(change: Callable[[dict], object]) -> Callable[[dict], None]:
    def change_all(content: dict) -> None:
        for annotation in content["annotations"]:
            change(annotation)

    return change_all


WRONG: dict[str, tuple[Callable[[dict], object], str]] = {
    "no area": (each(lambda a: a.pop("area")), "area"),
    "no iscrowd": (each(lambda a: a.pop("iscrowd")), "iscrowd"),
    "iscrowd as text": (each(lambda a: a.update(iscrowd="0")), "iscrowd"),
    "ignore": (lambda c: c["annotations"][3].update(ignore=1), "ignore"),
    "no mask": (lambda c: c["annotations"][3].update(segmentation=[]), "MODEL.MASK_ON"),
    "no masks": (each(lambda a: a.pop("segmentation")), "MODEL.MASK_ON"),
    "empty polygon": (lambda c: c["annotations"][3].update(segmentation=[[]]), "segmentation"),
    "pairs": (each(lambda a: a.update(segmentation=[[1, 2], [9, 2], [9, 9]])), "pairs"),
    "RLE": (each(lambda a: a.update(segmentation=as_rle(a["segmentation"]))), "INPUT.MASK_FORMAT"),
    "ids as text": (each(lambda a: a.update(image_id=str(a["image_id"]))), "image_id"),
    "annotation id 0": (lambda c: c["annotations"][0].update(id=0), "ids of annotations"),
    "float sizes": (lambda c: c["images"][2].update(width=128.0), "width"),
    "box outside": (lambda c: c["annotations"][0].update(bbox=[500, 5, 9, 9]), "outside"),
    "missing image": (lambda c: c["images"][2].update(file_name="none.png"), "none.png"),
    "corners": (each(lambda a: a.update(bbox=[70, 50, 110, 80], segmentation=[])), "x1"),
    "all twice": (
        lambda c: c["annotations"].extend({**a, "id": a["id"] + 99} for a in c["annotations"][:]),
        "twice",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_datasets(case, content, registered):
    change, named = WRONG[case]
    change(content)
    with pytest.raises(InputError, match=rf"(?s){NAME}.*{named}"):
        check_datasets(registered())


def test_what_boxes_do_not_need(content, registered):
    """Without a mask head, masks may be missing, or have any format."""
    for annotation in content["annotations"][::2]:
        annotation["segmentation"] = as_rle(annotation["segmentation"])
    for annotation in content["annotations"][1::2]:
        del annotation["segmentation"]
    assert check_datasets(registered("MODEL.MASK_ON", False)) == []


def test_bitmasks(content, registered):
    each(lambda a: a.update(segmentation=as_rle(a["segmentation"])))(content)
    assert check_datasets(registered("INPUT.MASK_FORMAT", "bitmask")) == []


def test_a_trainer_from_python(content, registered):
    """It refuses before anything is written."""
    each(lambda a: a.pop("area"))(content)
    cfg = registered()
    with pytest.raises(InputError, match=rf"(?s){NAME}.*area"):
        Trainer(cfg)


def test_images_whose_batches_are_skipped(content, registered):
    """In training only: an evaluation without an image would be another one."""
    content["images"][2]["file_name"] = "none.png"
    cfg = registered("SOLVER.SKIP_BAD_BATCHES", 3, "DATASETS.TEST", "()")
    assert any("none.png" in line for line in check_datasets(cfg))
    cfg.defrost()
    cfg.DATASETS.TEST = (NAME,)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(InputError, match=r"none\.png"):
        check_datasets(cfg)


def test_a_file_that_is_repaired_is_read_anew(content, registered, tmp_path):
    content["annotations"][0]["id"] = 0
    cfg = registered()
    with pytest.raises(InputError):
        check_datasets(cfg)
    content["annotations"][0]["id"] = 99
    (tmp_path / "data.json").write_text(json.dumps(content))
    assert check_datasets(cfg) == []


# Datasets whose function returns Detectron2's own records


def records(content: dict, folder: Path) -> list[dict]:
    path = folder / "data.json"
    path.write_text(json.dumps(content))
    return load_coco_json(str(path), str(folder / "images"))


WRONG_RECORDS: dict[str, tuple[Callable[[list[dict]], object], str]] = {
    "missing file": (lambda r: r[2].update(file_name="none.png"), "none.png"),
    "size": (lambda r: r[2].update(width=128.0), "width"),
    "box outside": (lambda r: r[2]["annotations"][0].update(bbox=[500, 5, 509, 14]), "outside"),
    "class": (lambda r: r[2]["annotations"][0].update(category_id=7), "category_id"),
    "no mode": (lambda r: r[2]["annotations"][0].pop("bbox_mode"), "bbox_mode"),
    "no file name": (lambda r: r[2].pop("file_name"), "file_name"),
    "no mask": (lambda r: r[2]["annotations"][0].pop("segmentation"), "MODEL.MASK_ON"),
}


@pytest.mark.parametrize("case", [None, *WRONG_RECORDS])
def test_records(case, content, registered, tmp_path):
    """Boxes may be arrays of corners, and images may be repeated, as in Detectron2."""
    given = records(content, tmp_path)
    for annotation in (a for record in given for a in record["annotations"]):
        box = BoxMode.convert(annotation["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        annotation |= {"bbox": np.array(box), "bbox_mode": BoxMode.XYXY_ABS}
        annotation["category_id"] -= 1  # the index of its class
    given.append(given[0])
    DatasetCatalog.register(NAME, lambda: given)
    MetadataCatalog.get(NAME).thing_classes = ["nut", "bolt"]
    cfg = config(tmp_path)
    if case is None:
        assert check_datasets(cfg) == []
        return
    change, named = WRONG_RECORDS[case]
    change(given)
    with pytest.raises(InputError, match=rf"(?s){NAME}.*{named}"):
        check_datasets(cfg)
