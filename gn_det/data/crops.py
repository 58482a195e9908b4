"""Objects of a COCO-format data set as square pictures, in one folder a class."""

from pathlib import Path

import numpy as np
from PIL import Image

from .image_files import read_image
from .json_files import read_json


def write_crops(annotations: Path, images: Path, folder: Path, side: int = 56) -> None:
    """Write every object but crowds to `folder/<category>/<annotation id>.png`.

    A crop is 1.2 to 2 times as large as its object, black outside the picture, and the same each
    time. Categories without objects get their folder too.

    Args:
        annotations: file of instances, in COCO's format.
        images: folder of its pictures.
        side: of the crops, in pixels; the default is what a 48 px classifier is tested on.

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
        picture = Image.fromarray(read_image(images / image["file_name"]))
        for found in objects[image["id"]]:
            x, y, width, height = found["bbox"]
            half = np.random.default_rng(found["id"]).uniform(0.6, 1.0) * max(width, height)
            x, y = x + width / 2, y + height / 2
            crop = picture.transform(
                (side, side),
                Image.Transform.EXTENT,
                (x - half, y - half, x + half, y + half),
                Image.Resampling.BILINEAR,
            )
            crop.save(folder / names[found["category_id"]] / f"{found['id']:06d}.png")
