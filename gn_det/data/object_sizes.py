"""Image and object sizes of a training set."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class ObjectSizes:
    """Image and object sizes of a training set, in pixels.

    Args:
        images: float (N, 2), width and height of the images that have objects.
        objects: float (M, 2), width and height of the objects' boxes.
        owners: int (M,), for each object the row of its image in `images`.
    """

    images: np.ndarray
    objects: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, annotations: Path) -> "ObjectSizes":
        """Read the sizes from a COCO instances file, without crowds and empty boxes."""
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
        """Object sizes after Detectron2's `ResizeShortestEdge`.

        Args:
            side: target length of the images' shorter side in pixels; 0 disables resizing, as for
                `INPUT.MIN_SIZE_TEST`.
            longest: maximum length of the longer side in pixels.

        Returns:
            float (M, 2), width and height in pixels.
        """
        short, long = self.images.min(1), self.images.max(1)
        if side == 0:
            return self.objects
        return self.objects * np.minimum(side / short, longest / long)[self.owners, None]
