"""Sizes of the images and objects in a training set."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class ObjectSizes:
    """Sizes in a training set, in pixels.

    Args:
        pictures: (N, 2), width and height of the pictures that have objects.
        objects: (M, 2), width and height of the objects' boxes.
        owners: (M,), the row of `pictures` that each object is in.
    """

    pictures: np.ndarray
    objects: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, annotations: Path) -> "ObjectSizes":
        """The sizes in a COCO instances file, crowds and empty boxes left out."""
        content = json.loads(annotations.read_text())
        objects = content["annotations"]
        real = [a for a in objects if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
        ids = sorted({a["image_id"] for a in real})
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        row = {number: i for i, number in enumerate(ids)}
        return cls(
            np.array([sizes[number] for number in ids], dtype=float),
            np.array([a["bbox"][2:] for a in real], dtype=float),
            np.array([row[a["image_id"]] for a in real]),
        )

    def resized(self, side: int, longest: int) -> np.ndarray:
        """The objects' widths and heights, (M, 2), once Detectron2 has resized their pictures.

        Args:
            side: what the shorter side is brought to.
            longest: the longer side is made no longer than this.
        """
        short, long = self.pictures.min(1), self.pictures.max(1)
        if side == 0:
            return self.objects  # Detectron2 leaves the pictures as they are
        return self.objects * np.minimum(side / short, longest / long)[self.owners, None]
