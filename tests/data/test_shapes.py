"""The synthetic dataset `shapes`: COCO format, documented content, and reproducibility."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import command
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from gn_det.data import make_shapes
from gn_det.data.shapes import CATEGORIES, draw_image
from gn_det.errors import InputError


def digest(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, list[dict]]]:
    return [draw_image(np.random.default_rng([0, 0, i])) for i in range(150)]


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        make_shapes(tmp_path / name, num_train=3, num_val=2, seed=seed)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert digest(tmp_path / "one") != digest(tmp_path / "other")
    images = [name for name in digest(tmp_path / "one") if name.startswith("images/")]
    assert len(images) == 5


def test_a_larger_dataset_starts_with_the_smaller_one(tmp_path):
    make_shapes(tmp_path / "small", num_train=2, num_val=1, seed=5)
    make_shapes(tmp_path / "large", num_train=4, num_val=1, seed=5)
    small, large = digest(tmp_path / "small"), digest(tmp_path / "large")
    assert all(large[name] == small[name] for name in small if name.endswith(".png"))


def test_content_is_as_documented(scenes):
    annotations = [a for _, objects in scenes for a in objects]
    objects = [a for a in annotations if not a["iscrowd"]]
    sides = {side for image, _ in scenes for side in image.shape[:2]}
    assert min(sides) >= 160 and max(sides) <= 224
    assert len(CATEGORIES) >= 6
    assert {a["category_id"] for a in objects} == set(range(1, len(CATEGORIES) + 1))
    areas = np.array([a["area"] for a in objects])
    small, large = areas < 32**2, areas >= 96**2
    for size in (small, ~small & ~large, large):
        assert size.mean() > 0.01
    assert any(a["iscrowd"] for a in annotations)
    assert any(not objects for _, objects in scenes)
    assert any(isinstance(a["segmentation"], dict) for a in objects), "holes"
    assert any(isinstance(a["segmentation"], list) and len(a["segmentation"]) > 1 for a in objects)
    assert np.mean([isinstance(a["segmentation"], list) for a in objects]) > 0.7


def test_annotations_agree_with_pycocotools(shapes):
    truth = COCO(str(shapes / "instances_train.json"))
    assert len(truth.imgs) == 12
    for annotation in truth.anns.values():
        mask = truth.annToMask(annotation).astype(bool)
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert annotation["area"] == mask.sum() > 0
        assert abs(columns.min() - x) <= 1 and abs(columns.max() + 1 - x - width) <= 1
        assert abs(rows.min() - y) <= 1 and abs(rows.max() + 1 - y - height) <= 1
        record = truth.imgs[annotation["image_id"]]
        assert Image.open(shapes / "images" / record["file_name"]).size == mask.shape[::-1]


def test_masks_match_the_painted_pixels(scenes):
    """The mean colour inside a mask differs from that just outside it."""
    differences = []
    for image, annotations in scenes[:40]:
        for a in annotations:
            if a["iscrowd"] or a["area"] < 300:
                continue
            rle = a["segmentation"]
            if isinstance(rle, list):
                rle = mask_util.merge(mask_util.frPyObjects(rle, *image.shape[:2]))
            mask = mask_util.decode(rle).astype(bool)
            shifts = [np.roll(mask, step, axis) for step in (-2, 2) for axis in (0, 1)]
            ring = np.any(shifts, axis=0) & ~mask
            inside, outside = (image[m].astype(float).mean(axis=0) for m in (mask, ring))
            differences.append(np.abs(inside - outside).max())
    assert np.median(differences) > 20


def test_detectron2_loads_it():
    records = DatasetCatalog.get("shapes_train")
    assert len(records) == 12
    assert sum(len(r["annotations"]) for r in records) > 12


def test_command(tmp_path):
    done = command("tools/make_shapes.py", tmp_path / "s", "--num-train", 2, "--num-val", 1)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "s/instances_train.json").read_text())["images"]) == 2
    again = command("tools/make_shapes.py", tmp_path / "s")
    assert again.returncode == 1 and again.stderr.startswith(f"error: {tmp_path}/s exists")


def test_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=str(tmp_path / "file" / "shapes")):
        make_shapes(tmp_path / "file" / "shapes")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
