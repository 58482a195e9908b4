"""COCO metrics, compared with Detectron2's evaluator and with known values."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from gn_det.evaluation.coco_stats import PRECISIONS, STATS, coco_stats


@pytest.fixture(scope="module")
def evaluated(shapes, tmp_path_factory) -> tuple[OrderedDict, dict]:
    """Metrics of Detectron2 and of `coco_stats`, for shifted and partly misclassified objects."""
    output = tmp_path_factory.mktemp("inference")
    truth = COCO(str(shapes / "instances_val.json"))
    DatasetCatalog.get("shapes_val")  # so that the classes have names
    evaluator = COCOEvaluator("shapes_val", tasks=("bbox", "segm"), output_dir=str(output))
    evaluator.reset()
    rng = np.random.default_rng(0)
    for image_id, image in truth.imgs.items():
        instances = Instances((image["height"], image["width"]))
        annotations = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
        x, y, w, h = np.array([a["bbox"] for a in annotations]).reshape(-1, 4).T
        shift = rng.uniform(-4, 4, len(annotations))
        boxes = np.stack([x + shift, y, x + w + shift, y + h], axis=1)
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.tensor(rng.random(len(annotations)))
        classes = [a["category_id"] - 1 for a in annotations]
        instances.pred_classes = torch.tensor(
            [(c + (rng.random() < 0.3)) % 6 for c in classes]
        ).long()
        pairs = zip(annotations, shift, strict=True)
        masks = [np.roll(truth.annToMask(a), int(step), axis=1) for a, step in pairs]
        instances.pred_masks = torch.tensor(np.array(masks).reshape(-1, *instances.image_size)) > 0
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    theirs = evaluator.evaluate()
    results = output / "coco_instances_results.json"
    return theirs, coco_stats(shapes / "instances_val.json", results)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equal_to_detectron2(evaluated, kind):
    theirs, ours = evaluated
    assert list(ours[kind]) == [*STATS, "classes"]
    for name, ap in ours[kind]["classes"].items():
        expected = theirs[kind][f"AP-{name}"]
        assert ap is None if np.isnan(expected) else ap == pytest.approx(expected)
    for name in PRECISIONS:
        expected = theirs[kind][name]
        if np.isnan(expected):
            assert ours[kind][name] is None
        else:
            assert ours[kind][name] == pytest.approx(expected)
    assert 5 < ours[kind]["AP"] < 95
    assert ours[kind]["AR1"] <= ours[kind]["AR10"] <= ours[kind]["AR100"]


def test_mask_sizes_are_mask_areas(evaluated):
    """The mask of a ring is smaller than its box, so APs differs between boxes and masks."""
    _, ours = evaluated
    assert ours["segm"]["APs"] != ours["bbox"]["APs"]


def test_perfect_and_missing_detections(shapes, tmp_path):
    annotations = shapes / "instances_val.json"
    truth = COCO(str(annotations))
    keys = ("image_id", "category_id", "bbox")
    perfect = []
    for a in truth.anns.values():
        if not a["iscrowd"]:
            rle = truth.annToRLE(a)
            counts = rle["counts"]
            counts = counts.decode() if isinstance(counts, bytes) else counts
            entry = {**{k: a[k] for k in keys}, "segmentation": {**rle, "counts": counts}}
            perfect.append({**entry, "score": 1.0})
    (tmp_path / "perfect.json").write_text(json.dumps(perfect))
    (tmp_path / "empty.json").write_text("[]")
    for name, expected in (("perfect", 100.0), ("empty", 0.0)):
        stats = coco_stats(annotations, tmp_path / f"{name}.json")
        for kind in ("bbox", "segm"):
            assert stats[kind]["AP"] == stats[kind]["AR100"] == pytest.approx(expected)
            assert stats[kind]["AP75"] == pytest.approx(expected)


FIXTURE = ROOT.parent / "shared/data/cocoeval_fixture"


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"{FIXTURE} is missing")
def test_known_results(tmp_path):
    """COCO's example detections, whose AP is published."""
    path = FIXTURE / "instances_val2014_100.json"
    masks = coco_stats(path, FIXTURE / "instances_val2014_fakesegm100_results.json")
    assert masks["segm"]["AP"] == pytest.approx(31.9545, abs=1e-4)
    truth = json.loads(path.read_text())
    for annotation in truth["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(truth))
    boxes = coco_stats(
        tmp_path / "boxes.json", FIXTURE / "instances_val2014_fakebbox100_results.json"
    )
    assert list(boxes) == ["bbox"], "the ground truth has no masks"
    assert boxes["bbox"]["AP"] == pytest.approx(50.4581, abs=1e-4)
