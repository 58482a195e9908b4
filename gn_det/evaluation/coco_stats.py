"""All 12 COCO metrics of a results file; Detectron2's evaluator reports only the 6 for AP."""

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
    """COCO's 12 metrics for boxes and for masks, and AP per class, in percent.

    Args:
        annotations: ground truth in COCO's instances format, or the result of `load_coco`.
        results: detections in COCO's results format, as Detectron2 writes them to
            `inference/coco_instances_results.json`.

    Returns:
        {"bbox": {...}}, and "segm" if the ground truth has masks. Each has the keys of `STATS`,
        and "classes", which is {class name: AP}. Metrics without ground truth are None; all others
        are 0 if there are no detections.
    """
    truth = annotations if isinstance(annotations, COCO) else load_coco(annotations)
    return {kind: _summarize(truth, results, kind) for kind in kinds_of(truth)}


def kinds_of(truth: COCO) -> tuple[str, ...]:
    """The IoU types to evaluate: ("bbox", "segm"), or ("bbox",) if no object has a mask."""
    return (
        ("bbox", "segm") if any(a.get("segmentation") for a in truth.anns.values()) else ("bbox",)
    )


def load_coco(annotations: Path) -> COCO:
    """Load a COCO annotation file without pycocotools' messages."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))


def load_detections(truth: COCO, results: Path, iou_type: str) -> COCO:
    """Load a results file for pycocotools' evaluation.

    Args:
        truth: the ground truth.
        results: detections in COCO's results format.
        iou_type: "bbox" or "segm".
    """
    detections = json.loads(results.read_text())
    if not detections:
        # pycocotools cannot load an empty list
        return COCO()
    if iou_type == "segm":
        # With boxes pycocotools would use the area of the box as that of the mask
        detections = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        return truth.loadRes(detections)


def _summarize(truth: COCO, results: Path, iou_type: str) -> dict[str, Any]:
    evaluation = COCOeval(truth, load_detections(truth, results, iou_type), iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    percent = (None if stat < 0 else 100 * float(stat) for stat in evaluation.stats)
    # (IoU thresholds, recalls, classes), all areas, 100 detections; -1 without ground truth
    precision = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    classes = {
        truth.cats[number]["name"]: None if ap < 0 else 100 * float(ap)
        for number, ap in zip(evaluation.params.catIds, precision, strict=True)
    }
    return {**dict(zip(STATS, percent, strict=True)), "classes": classes}
