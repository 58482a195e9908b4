"""All of COCO's numbers from a results file; Detectron2's evaluator keeps half of them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
STATS = (*PRECISIONS, *RECALLS)


def coco_stats(annotations: Path | COCO, results: Path) -> dict[str, dict[str, Any]]:
    """COCO's 12 numbers for boxes and for masks, and AP class by class, in percent.

    Args:
        annotations: ground truth in COCO's instances format, or what `load_coco` made of it.
        results: detections in COCO's results format, as Detectron2 writes them to
            `inference/coco_instances_results.json`.

    Returns:
        {"bbox": {...}}, and "segm" if the ground truth has masks, each with the keys of `STATS` and
        with "classes", which holds AP by the classes' names. A number that the data set has no
        ground truth for is None; without any detection all others are 0.
    """
    truth = annotations if isinstance(annotations, COCO) else load_coco(annotations)
    return {kind: _summarize(truth, results, kind) for kind in kinds_of(truth)}


def kinds_of(truth: COCO) -> tuple[str, ...]:
    """What there is to measure: ("bbox", "segm"), or ("bbox",) where no object has a mask."""
    return (
        ("bbox", "segm") if any(a.get("segmentation") for a in truth.anns.values()) else ("bbox",)
    )


def load_coco(annotations: Path) -> COCO:
    """A COCO annotation file, without pycocotools' own words."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))


def load_detections(truth: COCO, results: Path, iou_type: str) -> COCO:
    """A results file as pycocotools compares it with the ground truth.

    Args:
        iou_type: "bbox" or "segm".
    """
    detections = json.loads(results.read_text())
    if not detections:
        # pycocotools cannot load an empty list
        return COCO()
    if iou_type == "segm":
        # With a box at hand pycocotools would take the box's area for the mask's
        detections = [{k: v for k, v in found.items() if k != "bbox"} for found in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        return truth.loadRes(detections)


def _summarize(truth: COCO, results: Path, iou_type: str) -> dict[str, Any]:
    evaluation = COCOeval(truth, load_detections(truth, results, iou_type), iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    percent = (None if stat < 0 else 100 * float(stat) for stat in evaluation.stats)
    # (IoU thresholds, recalls, classes) of all sizes and 100 detections; -1 without ground truth
    precision = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    classes = {
        truth.cats[number]["name"]: None if ap < 0 else 100 * float(ap)
        for number, ap in zip(evaluation.params.catIds, precision, strict=True)
    }
    return {**dict(zip(STATS, percent, strict=True)), "classes": classes}
