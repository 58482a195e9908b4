"""`shapes`: an embedded instance-segmentation data set, drawn from a seed, in COCO format.

Six categories that differ in outline and texture, never in colour, on textured backgrounds, with
occlusion, holes, objects cut by the border, crowds and pictures without any object.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image
from pycocotools import mask as mask_util
from shapely import Point, Polygon, affinity, box
from shapely.geometry.base import BaseGeometry

from ..errors import InputError
from .crops import write_crops
from .textures import paint_background, paint_object

CATEGORIES = ("disc", "square", "triangle", "star", "cross", "ring")
SPLITS = ("train", "val")

SIDES = (160, 225)  # pixels, half open
RADII = (14.0, 90.0)  # pixels, drawn log-uniformly: small, medium and large by COCO's areas
TURN = np.pi / 6  # objects are turned by up to this angle, in radians
EMPTY, CROWDED = 0.04, 0.05  # shares of pictures without objects, and with a crowd region


def _star(points: int, inner: float) -> Polygon:
    turn = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return Polygon(np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1))


_DISC = Point(0, 0).buffer(1.0, quad_segs=12)
_SQUARE = box(-0.8, -0.8, 0.8, 0.8)
# One outline a category, inside the unit circle
_OUTLINES: dict[str, BaseGeometry] = {
    "disc": _DISC,
    "square": _SQUARE,
    "triangle": _star(3, 0.5),
    "star": _star(5, 0.45),
    "cross": box(-0.95, -0.3, 0.95, 0.3) | box(-0.3, -0.95, 0.3, 0.95),
    "ring": _DISC - affinity.scale(_DISC, 0.5, 0.5),
}


class _Object:
    """An outline at a place of the picture; `(u, v)` are pixel coordinates in its own frame."""

    def __init__(self, category: int, x: float, y: float, radius: float, turn: float) -> None:
        self.category = category
        self.frame = (x, y, radius, turn)
        outline = affinity.rotate(_OUTLINES[CATEGORIES[category]], turn, (0, 0), use_radians=True)
        self.outline = affinity.translate(
            affinity.scale(outline, radius, radius, origin=(0, 0)), x, y
        )

    @classmethod
    def draw(cls, rng: Generator, width: int, height: int) -> "_Object":
        radius = float(np.exp(rng.uniform(*np.log(RADII))))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        return cls(int(rng.integers(len(CATEGORIES))), x, y, radius, rng.uniform(-TURN, TURN))


def _place_objects(rng: Generator, frame: Polygon, count: int) -> list[_Object]:
    """Up to `count` objects, later ones on top, each at least 60% seen in the end."""
    placed: list[_Object] = []
    for _ in range(20 * count):
        new = _Object.draw(rng, int(frame.bounds[2]), int(frame.bounds[3]))
        scene = [*placed, new]
        seen = (visible(scene, i, frame).area / scene[i].outline.area for i in range(len(scene)))
        if all(share >= 0.6 for share in seen):
            placed = scene
        if len(placed) == count:
            break
    return placed


def _place_crowd(rng: Generator, frame: Polygon) -> list[_Object]:
    """A heap of small objects of one category, annotated as one `iscrowd` region."""
    width, height = frame.bounds[2:]
    category, radius = int(rng.integers(len(CATEGORIES))), rng.uniform(7, 10)
    x, y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height
    spots = rng.normal((x, y), 2 * radius, size=(int(rng.integers(8, 15)), 2))
    return [_Object(category, x, y, radius, rng.uniform(-TURN, TURN)) for x, y in spots]


def visible(scene: list[_Object], index: int, frame: Polygon) -> BaseGeometry:
    """The part of an object inside the picture that no later object covers."""
    seen = scene[index].outline & frame
    for above in scene[index + 1 :]:
        seen = seen - above.outline
    return seen


def _polygons(geometry: BaseGeometry) -> list[Polygon]:
    """The polygons of a geometry, without slivers below one pixel."""
    parts = getattr(geometry, "geoms", [geometry])
    return [part for part in parts if isinstance(part, Polygon) and part.area >= 1]


def _flat(ring: Any) -> list[float]:
    return np.round(np.asarray(ring.coords)[:-1], 2).ravel().tolist()


def _rasterize(geometry: BaseGeometry, height: int, width: int) -> np.ndarray:
    """Boolean (height, width) mask, by the rule that COCO's evaluation fills polygons with."""
    mask = np.zeros((height, width), dtype=bool)
    for part in _polygons(geometry):
        for i, ring in enumerate([part.exterior, *part.interiors]):
            filled = mask_util.decode(mask_util.frPyObjects([_flat(ring)], height, width))
            mask = mask & ~filled[..., 0].astype(bool) if i else mask | filled[..., 0].astype(bool)
    return mask


def _annotation(seen: BaseGeometry, mask: np.ndarray, category: int, crowd: bool) -> dict[str, Any]:
    """COCO annotation: polygons where the visible part has no hole and is no crowd, else RLE."""
    parts = _polygons(seen)
    if crowd or any(part.interiors for part in parts):
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation: Any = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    else:
        segmentation = [_flat(part.exterior) for part in parts]
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, *mask.shape))
    return {
        "category_id": category + 1,
        "segmentation": segmentation,
        "area": int(mask_util.area(rle)),
        "bbox": mask_util.toBbox(rle).tolist(),
        "iscrowd": int(crowd),
    }


def draw_image(rng: Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One picture and its annotations.

    Returns:
        RGB uint8 array of shape (H, W, 3), and annotations without `id` and `image_id`.
    """
    width, height = (int(side) for side in rng.integers(*SIDES, size=2))
    frame = box(0, 0, width, height)
    crowd: list[_Object] = []
    objects: list[_Object] = []
    if rng.random() >= EMPTY:
        crowd = _place_crowd(rng, frame) if rng.random() < CROWDED else []
        objects = _place_objects(rng, frame, int(rng.integers(1, 7)))
    picture = paint_background(rng, height, width)
    scene = [*crowd, *objects]
    owner = np.full((height, width), -1)
    for i, thing in enumerate(scene):
        mask = _rasterize(thing.outline & frame, height, width)
        owner[mask] = i
        paint_object(rng, picture, mask, CATEGORIES[thing.category], thing.frame)
    annotations = []
    for i in range(len(crowd), len(scene)):
        seen = visible(scene, i, frame)
        annotations.append(_annotation(seen, owner == i, scene[i].category, crowd=False))
    heap = (owner >= 0) & (owner < len(crowd))
    if heap.any():
        annotations.append(_annotation(Polygon(), heap, crowd[0].category, crowd=True))
    noise = rng.normal(0, 5, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8), annotations


def make_shapes(root: Path, num_train: int = 600, num_val: int = 100, seed: int = 0) -> None:
    """Write `images/*.png`, `instances_{train,val}.json` and `crops/{train,val}/` below `root`.

    The same seed gives the same bytes, and a larger split begins with the pictures of a smaller
    one. Everything is written beside `root` first and moved there when it is whole.

    Raises:
        InputError: if `root` exists already, or cannot be written.
    """
    if root.exists():
        raise InputError(f"{root} exists already: remove it or name another folder")
    partial = root.with_name(f".{root.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "images").mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write the data set to {root}: {error.strerror}") from None
    for index, (split, count) in enumerate(zip(SPLITS, (num_train, num_val), strict=True)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            picture, found = draw_image(np.random.default_rng([seed, index, i]))
            name = f"{split}_{i:06d}.png"
            Image.fromarray(picture).save(partial / "images" / name)
            height, width = picture.shape[:2]
            images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
            for annotation in found:
                ids = {"id": len(annotations) + 1, "image_id": i + 1}
                annotations.append({**ids, **annotation})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)]
        info = {"description": f"gn_det shapes, {split}, seed {seed}"}
        content = {"info": info, "licenses": [], "images": images, "annotations": annotations}
        (partial / f"instances_{split}.json").write_text(
            json.dumps({**content, "categories": categories})
        )
        crops = partial / "crops" / split
        write_crops(partial / f"instances_{split}.json", partial / "images", crops)
    partial.rename(root)
