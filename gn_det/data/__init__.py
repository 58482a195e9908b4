"""Datasets: COCO-format files, image folders, and the embedded dataset `shapes`.

Importing this package registers `shapes_train` and `shapes_val` in Detectron2's catalogs. Like
Detectron2's built-in datasets, they are expected in `$DETECTRON2_DATASETS` (default
`./datasets`), and no file is read until they are used.
"""

import os
from pathlib import Path

from detectron2.data.datasets import register_coco_instances

from .coco import check_dataset
from .shapes import SPLITS, make_shapes

__all__ = ["check_dataset", "make_shapes"]

_ROOT = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "shapes"
for _split in SPLITS:
    register_coco_instances(
        f"shapes_{_split}", {}, str(_ROOT / f"instances_{_split}.json"), str(_ROOT / "images")
    )
