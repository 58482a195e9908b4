"""`shapes`: a synthetic instance segmentation dataset in COCO format, generated from a seed.

It has six categories, which differ in outline and texture but not in colour, on textured
backgrounds. There are occlusions, holes, truncated objects, crowds and images without objects.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image
from pycocotools import mask as mask_util
from shapely import Point, Polygon, affinity, box
from shapely.geometry.base import BaseGeometry

from ..files import new_dataset
from .crops import write_crops
from .textures import paint_background, paint_object

CATEGORIES = ("disc", "square", "triangle", "star", "cross", "ring")
SPLITS = ("train", "val")

SIDES = (160, 225)  # width and height of images in pixels, upper limit excluded
RADII = (14.0, 90.0)  # in pixels, log-uniform: includes COCO's small, medium and large objects
MAX_ANGLE = np.pi / 6  # objects are rotated by up to this angle, in radians
EMPTY, CROWDED = 0.04, 0.05  # shares of images without objects, and with a crowd region


def _star(points: int, inner: float) -> Polygon:
    """A star with outer radius 1 and the given inner radius."""
    turn = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return Polygon(np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1))


_DISC = Point(0, 0).buffer(1.0, quad_segs=12)
_SQUARE = box(-0.8, -0.8, 0.8, 0.8)
# One outline per category, inside the unit circle except for the corners of the square
_OUTLINES: dict[str, BaseGeometry] = {
    "disc": _DISC,
    "square": _SQUARE,
    "triangle": _star(3, 0.5),
    "star": _star(5, 0.45),
    "cross": box(-0.95, -0.3, 0.95, 0.3) | box(-0.3, -0.95, 0.3, 0.95),
    "ring": _DISC - affinity.scale(_DISC, 0.5, 0.5),
}


class _Object:
    """An object: category, outline in pixels, and frame (x, y, radius, angle in radians)."""

    def __init__(self, category: int, x: float, y: float, radius: float, angle: float) -> None:
        self.category = category
        self.frame = (x, y, radius, angle)
        outline = affinity.rotate(_OUTLINES[CATEGORIES[category]], angle, (0, 0), use_radians=True)
        self.outline = affinity.translate(
            affinity.scale(outline, radius, radius, origin=(0, 0)), x, y
        )

    @classmethod
    def draw(cls, rng: Generator, width: int, height: int) -> "_Object":
        """Draw an object with random category, centre, radius and angle."""
        radius = float(np.exp(rng.uniform(*np.log(RADII))))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        angle = (-MAX_ANGLE, MAX_ANGLE)
        return cls(int(rng.integers(len(CATEGORIES))), x, y, radius, rng.uniform(*angle))


def _place_objects(rng: Generator, frame: Polygon, count: int) -> list[_Object]:
    """Place up to `count` objects, later ones on top, each of them at least 60% visible."""
    placed: list[_Object] = []
    for _ in range(20 * count):
        new = _Object.draw(rng, int(frame.bounds[2]), int(frame.bounds[3]))
        scene = [*placed, new]
        shares = (visible(scene, i, frame).area / scene[i].outline.area for i in range(len(scene)))
        if all(share >= 0.6 for share in shares):
            placed = scene
        if len(placed) == count:
            break
    return placed


def _place_crowd(rng: Generator, frame: Polygon) -> list[_Object]:
    """Place a crowd: small objects of one category, annotated as one `iscrowd` region."""
    width, height = frame.bounds[2:]
    category, radius = int(rng.integers(len(CATEGORIES))), rng.uniform(7, 10)
    x, y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height
    spots = rng.normal((x, y), 2 * radius, size=(int(rng.integers(8, 15)), 2))
    angle = (-MAX_ANGLE, MAX_ANGLE)
    return [_Object(category, x, y, radius, rng.uniform(*angle)) for x, y in spots]


def visible(scene: list[_Object], index: int, frame: Polygon) -> BaseGeometry:
    """The part of an object that is inside the image and not covered by later objects."""
    part = scene[index].outline & frame
    for above in scene[index + 1 :]:
        part = part - above.outline
    return part


def _polygons(geometry: BaseGeometry) -> list[Polygon]:
    """The polygons of a geometry that have an area of at least one pixel."""
    parts = getattr(geometry, "geoms", [geometry])
    return [part for part in parts if isinstance(part, Polygon) and part.area >= 1]


def _flat(ring: Any) -> list[float]:
    """A closed ring as COCO's list x1, y1, x2, y2, ..., rounded to 0.01 pixels."""
    return np.round(np.asarray(ring.coords)[:-1], 2).ravel().tolist()


def _rasterize(geometry: BaseGeometry, height: int, width: int) -> np.ndarray:
    """Rasterize a geometry to a bool (height, width) mask, with pycocotools' polygon filling."""
    mask = np.zeros((height, width), dtype=bool)
    for part in _polygons(geometry):
        for i, ring in enumerate([part.exterior, *part.interiors]):
            filled = mask_util.decode(mask_util.frPyObjects([_flat(ring)], height, width))
            mask = mask & ~filled[..., 0].astype(bool) if i else mask | filled[..., 0].astype(bool)
    return mask


def _annotation(part: BaseGeometry, mask: np.ndarray, category: int, crowd: bool) -> dict[str, Any]:
    """A COCO annotation, with RLE for crowds and visible parts with holes, polygons otherwise."""
    parts = _polygons(part)
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
    """Draw an image and its annotations.

    Returns:
        uint8 (H, W, 3), RGB, and COCO annotations without `id` and `image_id`.
    """
    width, height = (int(side) for side in rng.integers(*SIDES, size=2))
    frame = box(0, 0, width, height)
    crowd: list[_Object] = []
    objects: list[_Object] = []
    if rng.random() >= EMPTY:
        crowd = _place_crowd(rng, frame) if rng.random() < CROWDED else []
        objects = _place_objects(rng, frame, int(rng.integers(1, 7)))
    image = paint_background(rng, height, width)
    scene = [*crowd, *objects]
    owner = np.full((height, width), -1)
    for i, item in enumerate(scene):
        mask = _rasterize(item.outline & frame, height, width)
        owner[mask] = i
        paint_object(rng, image, mask, CATEGORIES[item.category], item.frame)
    annotations = []
    for i in range(len(crowd), len(scene)):
        part = visible(scene, i, frame)
        annotations.append(_annotation(part, owner == i, scene[i].category, crowd=False))
    crowd_mask = (owner >= 0) & (owner < len(crowd))
    if crowd_mask.any():
        annotations.append(_annotation(Polygon(), crowd_mask, crowd[0].category, crowd=True))
    noise = rng.normal(0, 5, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), annotations


def make_shapes(root: Path, num_train: int = 600, num_val: int = 100, seed: int = 0) -> None:
    """Generate `images/*.png`, `instances_{train,val}.json` and `crops/{train,val}/` in `root`.

    The same seed gives the same bytes. A larger split starts with the images of a smaller split.
    `root` is created only when the dataset is complete.

    Args:
        root: the folder to create.
        num_train: number of training images.
        num_val: number of validation images.
        seed: of the random generators.

    Raises:
        InputError: if `root` exists already, or cannot be created.
    """
    with new_dataset(root) as partial:
        (partial / "images").mkdir(parents=True)
        for index, (split, count) in enumerate(zip(SPLITS, (num_train, num_val), strict=True)):
            _write_split(partial, split, count, [seed, index])


def _write_split(root: Path, split: str, count: int, seed: list[int]) -> None:
    """Write the images, annotations and crops of one split; `seed` is that of all its images."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        pixels, objects = draw_image(np.random.default_rng([*seed, i]))
        name = f"{split}_{i:06d}.png"
        Image.fromarray(pixels).save(root / "images" / name)
        height, width = pixels.shape[:2]
        images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        for annotation in objects:
            ids = {"id": len(annotations) + 1, "image_id": i + 1}
            annotations.append({**ids, **annotation})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)]
    info = {"description": f"gn_det shapes, {split}, seed {seed[0]}"}
    content = {"info": info, "licenses": [], "images": images, "annotations": annotations}
    path = root / f"instances_{split}.json"
    path.write_text(json.dumps({**content, "categories": categories}))
    write_crops(path, root / "images", root / "crops" / split)
