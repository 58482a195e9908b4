"""Crop the objects of a COCO-format dataset into one folder of square images per class."""

from pathlib import Path

import numpy as np
from PIL import Image

from .image_files import read_image
from .json_files import read_json


def write_crops(annotations: Path, images: Path, folder: Path, side: int = 56) -> None:
    """Write each object except crowds to `folder/<category>/<annotation id>.png`.

    A crop is 1.2 to 2 times as large as the longer side of its object, and black outside the
    image. The factor is random, but determined by the annotation id. Categories without objects
    get an empty folder.

    Args:
        annotations: a COCO instances file.
        images: its image folder.
        folder: the output folder; it must not contain the class folders yet.
        side: width and height of a crop in pixels. The default suits a classifier with 48 px
            inputs, which resizes test images to 55 px.

    Raises:
        InputError: if the annotation file or an image cannot be read.
    """
    content = read_json(annotations)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for name in names.values():
        (folder / name).mkdir(parents=True)
    objects: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            objects[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        pixels = Image.fromarray(read_image(images / image["file_name"]))
        for annotation in objects[image["id"]]:
            x, y, width, height = annotation["bbox"]
            half = np.random.default_rng(annotation["id"]).uniform(0.6, 1.0) * max(width, height)
            x, y = x + width / 2, y + height / 2
            crop = pixels.transform(
                (side, side),
                Image.Transform.EXTENT,
                (x - half, y - half, x + half, y + half),
                Image.Resampling.BILINEAR,
            )
            crop.save(folder / names[annotation["category_id"]] / f"{annotation['id']:06d}.png")
