"""`write_crops`: objects of a COCO-format dataset as images in class folders."""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from gn_det.data.crops import write_crops


def digest(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_one_crop_per_object(shapes):
    content = json.loads((shapes / "instances_train.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    objects = [a for a in content["annotations"] if not a["iscrowd"]]
    crops = sorted((shapes / "crops/train").glob("*/*.png"))
    expected = {(names[a["category_id"]], a["id"]) for a in objects}
    assert {(crop.parent.name, int(crop.stem)) for crop in crops} == expected
    assert len(crops) == len(expected)
    assert all(Image.open(crop).size == (56, 56) for crop in crops)
    assert {p.name for p in (shapes / "crops/val").iterdir()} == set(names.values())


def write_one(folder: Path, image: np.ndarray, bbox: list[float]) -> np.ndarray:
    """Write the crops of a dataset of one image with one object and a crowd; return the only one.

    The crop has 40 x 40 pixels.
    """
    Image.fromarray(image).save(folder / "one.png")
    content = {
        "images": [{"id": 7, "file_name": "one.png"}],
        "annotations": [
            {"id": 3, "image_id": 7, "category_id": 9, "bbox": bbox},
            {"id": 4, "image_id": 7, "category_id": 9, "bbox": [5, 5, 9, 9], "iscrowd": 1},
        ],
        "categories": [{"id": 8, "name": "dust"}, {"id": 9, "name": "cell"}],
    }
    (folder / "one.json").write_text(json.dumps(content))
    write_crops(folder / "one.json", folder, folder / "crops", side=40)
    assert (folder / "crops/dust").is_dir()
    (crop,) = (folder / "crops/cell").iterdir()
    return np.array(Image.open(crop))


def test_object_is_centred_in_its_crop(tmp_path):
    """A red object of 30 x 20 px on blue is 1 / 2 to 1 / 1.2 as wide as its crop."""
    image = np.zeros((100, 120, 3), dtype=np.uint8)
    image[..., 2] = 255
    image[40:60, 50:80] = (255, 0, 0)
    crop = write_one(tmp_path, image, [50, 40, 30, 20])
    red = crop[..., 0] > 127
    columns, rows = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    assert 40 / 2 - 1 <= len(columns) <= 40 / 1.2 + 1
    assert abs(len(rows) / len(columns) - 20 / 30) < 0.06, "not distorted"
    assert abs(columns.mean() - 19.5) <= 1 and abs(rows.mean() - 19.5) <= 1
    assert red.sum() > 0.98 * len(rows) * len(columns)


def test_black_outside_the_image(tmp_path):
    crop = write_one(tmp_path, np.full((50, 50, 3), 200, dtype=np.uint8), [0, 0, 20, 20])
    assert (crop[0] == 0).all() and (crop[:, 0] == 0).all()
    assert (crop[20:30, 20:30] == 200).all()


def test_crops_are_reproducible(shapes, tmp_path):
    for name in ("one", "two"):
        write_crops(shapes / "instances_val.json", shapes / "images", tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") == digest(shapes / "crops/val")
