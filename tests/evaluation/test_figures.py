"""Drawings of annotations and detections."""

import numpy as np
import pytest
from pycocotools.coco import COCO

from gn_det.evaluation.figures import draw

SQUARES = [[10, 10, 20, 20], [60, 10, 20, 20]]


def dataset(names: list[str], width: int, height: int) -> COCO:
    truth = COCO()
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    images = [{"id": 1, "width": width, "height": height}]
    truth.dataset = {"images": images, "annotations": [], "categories": categories}
    truth.createIndex()
    return truth


def objects(**keys: object) -> list[dict]:
    return [{"image_id": 1, "category_id": 1, "bbox": box, **keys} for box in SQUARES]


@pytest.mark.parametrize("size", [(100, 40), (2000, 1500)])
def test_images_keep_their_size(size):
    truth = dataset(["nut"], *size)
    image = np.zeros((size[1], size[0], 3), np.uint8)
    assert draw(image, objects(score=0.9), truth).shape == image.shape
    longest = draw(image, objects(), truth, 1000).shape[1]
    assert longest == min(size[0], 1000)


def test_each_object_has_its_own_colour():
    drawn = draw(np.zeros((40, 100, 3), np.uint8), objects(), dataset(["nut"], 100, 40))
    one, two = drawn[30, 20], drawn[30, 70]  # the lower edges of the boxes
    assert one.any() and two.any() and (one != two).any()


@pytest.mark.parametrize("names", [["nut"], ["nut", "bolt"]])
def test_scores_are_drawn(names):
    """With a single class, too: without its name, which would be the same everywhere."""
    image, truth = np.zeros((40, 100, 3), np.uint8), dataset(names, 100, 40)
    without = draw(image, objects(), truth)
    assert (draw(image, objects(score=0.9), truth) != without).any()
    assert (draw(image, objects(score=0.9), truth) != draw(image, objects(score=0.8), truth)).any()


def test_small_masks_are_drawn_over_large_ones():
    large = [0, 0, 100, 0, 100, 40, 0, 40]
    small = [40, 10, 60, 10, 60, 30, 40, 30]
    entries = [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [40, 10, 20, 20],
            "segmentation": [small],
        },
        {
            "id": 2,
            "image_id": 1,
            "category_id": 1,
            "bbox": [0, 0, 100, 40],
            "segmentation": [large],
        },
    ]
    drawn = draw(np.full((40, 100, 3), 200, np.uint8), entries, dataset(["nut"], 100, 40))
    inside, beside = drawn[20, 50].astype(int), drawn[20, 80].astype(int)
    # 45% of the first colour over 45% of the second one
    first, second = (np.array([0xD5, 0x5E, 0x00]), np.array([0x00, 0x72, 0xB2]))
    expected = 0.55 * 200 + 0.45 * second
    assert np.abs(beside - expected).max() <= 1
    assert np.abs(inside - (0.55 * expected + 0.45 * first)).max() <= 2
