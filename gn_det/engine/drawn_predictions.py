"""A hook that draws detections on validation images into TensorBoard."""

import json
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase

from ..data.image_files import read_image
from ..evaluation.figures import MIN_SCORE, draw
from .predict import as_coco

LONGEST = 800  # pixels of the longer side


class DrawnPredictions(HookBase):
    """After each evaluation, adds the first images of the test set with their detections.

    The detections are those that the COCO evaluator has just written, so no model is run. For
    other evaluators, and in processes other than the main one, nothing is drawn. Of several test
    sets, the last one is drawn.

    Args:
        cfg: the config; `TEST.DRAWN_IMAGES` is the number of images.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._results = Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json"
        self._entries: list[dict[str, Any]] | None = None

    def before_train(self) -> None:
        # Of an earlier run in the same folder
        self._drawn = self._written()

    def after_step(self) -> None:
        self._draw_new()

    def after_train(self) -> None:
        self._draw_new()

    def _written(self) -> int:
        """When the detections were written, in nanoseconds; 0 without any."""
        return self._results.stat().st_mtime_ns if self._results.is_file() else 0

    def _draw_new(self) -> None:
        if (written := self._written()) == self._drawn:
            return
        self._drawn = written
        name = self._cfg.DATASETS.TEST[-1]
        if self._entries is None:
            self._entries = DatasetCatalog.get(name)[: self._cfg.TEST.DRAWN_IMAGES]
        metadata = MetadataCatalog.get(name)
        names = metadata.thing_classes
        # A dataset of dicts has no ids of its own
        ids = metadata.get("thing_dataset_id_to_contiguous_id", {k: k for k in range(len(names))})
        categories = [{"id": i, "name": names[k]} for i, k in ids.items()]
        detections = json.loads(self._results.read_text())
        for number, entry in enumerate(self._entries, start=1):
            image = read_image(Path(entry["file_name"]))
            mine = [
                d
                for d in detections
                if d["image_id"] == entry["image_id"] and d["score"] >= MIN_SCORE
            ]
            truth = as_coco(image, entry["image_id"], categories)
            drawn = torch.from_numpy(draw(image, mine, truth, LONGEST).copy()).permute(2, 0, 1)
            self.trainer.storage.put_image(f"predictions/{number}", drawn)
