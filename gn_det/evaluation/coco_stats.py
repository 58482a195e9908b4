"""All of COCO's numbers from a results file; Detectron2's evaluator keeps half of them."""

import contextlib
import io
import json
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
STATS = (*PRECISIONS, *RECALLS)


def coco_stats(annotations: Path, results: Path) -> dict[str, dict[str, float | None]]:
    """COCO's 12 numbers for boxes and for masks, in percent.

    Args:
        annotations: ground truth in COCO's instances format.
        results: detections in COCO's results format, with `bbox` and `segmentation`, as Detectron2
            writes them to `inference/coco_instances_results.json`.

    Returns:
        {"bbox": {...}, "segm": {...}}, each with the keys of `STATS`. A number that the data set
        has no ground truth for is None; without any detection all others are 0.
    """
    detections = json.loads(results.read_text())
    # With a box at hand pycocotools would take the box's area for the mask's.
    masks = [{k: v for k, v in found.items() if k != "bbox"} for found in detections]
    truth = load_coco(annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        return {
            "bbox": _summarize(truth, detections, "bbox"),
            "segm": _summarize(truth, masks, "segm"),
        }


def load_coco(annotations: Path) -> COCO:
    """A COCO annotation file, without pycocotools' own words."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))


def _summarize(truth: COCO, detections: list[dict], iou_type: str) -> dict[str, float | None]:
    if not detections:
        # pycocotools cannot load an empty list; a detection without overlap gives the same zeros.
        nowhere = {
            "image_id": truth.getImgIds()[0],
            "category_id": truth.getCatIds()[0],
            "score": 0,
        }
        empty_mask = {"size": [1, 1], "counts": "1"}
        detections = [{**nowhere, "bbox": [0, 0, 0, 0], "segmentation": empty_mask}]
    evaluation = COCOeval(truth, truth.loadRes(detections), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    percent = (None if stat < 0 else 100 * float(stat) for stat in evaluation.stats)
    return dict(zip(STATS, percent, strict=True))
