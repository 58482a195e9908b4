"""`TEST.DRAWN_IMAGES`: detections on validation images, in the events for TensorBoard."""

import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SCRATCH, shapes_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gn_det.engine.drawn_predictions import DrawnPredictions
from gn_det.engine.trainer import Trainer


@pytest.fixture
def hook(tmp_path):
    (tmp_path / "inference").mkdir()
    words = ("OUTPUT_DIR", tmp_path, "TEST.DRAWN_IMAGES", 2)
    hook = DrawnPredictions(shapes_config("mask_rcnn_R_18_FPN_gn", *words))
    hook.path = tmp_path / "inference/coco_instances_results.json"
    with EventStorage(0) as storage:
        hook.trainer = SimpleNamespace(storage=storage)
        yield hook


def images(hook) -> dict[str, np.ndarray]:
    """The images in the storage, (H, W, 3), which are removed from it."""
    found = {name: np.asarray(image).transpose(1, 2, 0) for name, image, _ in read(hook)}
    hook.trainer.storage.clear_images()
    return found


def read(hook) -> list:
    return hook.trainer.storage._vis_data


def test_detections_are_drawn_once(hook):
    first, second = DatasetCatalog.get("shapes_val")[:2]
    hook.path.write_text("[]")
    os.utime(hook.path, (1, 1))
    hook.before_train()
    hook.after_step()
    assert images(hook) == {}, "these are of an earlier run"
    box = {"image_id": first["image_id"], "category_id": 1, "bbox": [20.0, 30.0, 60.0, 50.0]}
    unlikely = {**box, "image_id": second["image_id"], "score": 0.2}
    hook.path.write_text(json.dumps([{**box, "score": 0.9}, unlikely]))
    hook.after_step()
    drawn = images(hook)
    assert set(drawn) == {"predictions/1", "predictions/2"}
    one, two = (np.asarray(Image.open(e["file_name"]).convert("RGB")) for e in (first, second))
    assert np.array_equal(drawn["predictions/2"], two), "its only detection is unlikely"
    changed = (drawn["predictions/1"] != one).any(axis=2)
    assert changed[60, 20] and changed[79:82, 50].any() and not changed[55:75, 40:70].any()
    hook.after_step()
    hook.after_train()
    assert images(hook) == {}


def test_a_dataset_of_dicts(hook):
    """Its categories have no ids but their positions."""
    entries = DatasetCatalog.get("shapes_val")[:1]
    DatasetCatalog.register("of_dicts", lambda: entries)
    MetadataCatalog.get("of_dicts").thing_classes = ["first", "second"]
    try:
        hook._cfg.defrost()
        hook._cfg.DATASETS.TEST = ("of_dicts",)
        hook.before_train()
        box = {"image_id": entries[0]["image_id"], "bbox": [20.0, 30.0, 60.0, 50.0], "score": 0.9}
        hook.path.write_text(json.dumps([{**box, "category_id": 1}]))
        hook.after_step()
        assert set(images(hook)) == {"predictions/1"}
    finally:
        DatasetCatalog.remove("of_dicts")
        MetadataCatalog.remove("of_dicts")


def test_events_of_a_training(tmp_path):
    words = (*SCRATCH, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "OUTPUT_DIR", tmp_path)
    trainer = Trainer(shapes_config("mask_rcnn_R_18_FPN_gn", *words))
    trainer.train()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == [f"predictions/{i}" for i in range(1, 5)]
    (image,) = events.Images("predictions/1")
    entry = DatasetCatalog.get("shapes_val")[0]
    size = Image.open(io.BytesIO(image.encoded_image_string)).size
    assert size == (entry["width"], entry["height"])
