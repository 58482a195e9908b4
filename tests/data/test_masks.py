"""Masks that pycocotools, which is written in C, would misread or crash on."""

import json
import random
import sys
from itertools import accumulate

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from child import limit_memory, run_in_child
from PIL import Image

from gn_det.data.annotations import clean_objects
from gn_det.data.clean import Source
from gn_det.data.findings import Findings
from gn_det.data.inspect_source import inspect_source
from gn_det.data.masks import area_of, bounds_of, clean_mask, length_of

SIZE = (30, 40)  # height, width
SQUARE = [10, 10, 20, 10, 20, 20, 10, 20]


def take(mask: object, size: tuple[int, int] = SIZE) -> tuple:
    """The cleaned mask, or None, and the lines of fatal findings."""
    findings = Findings()
    return clean_mask("mask 7", mask, size, findings), [str(f) for f in findings if f.fatal]


def pixels_of(counts: object) -> np.ndarray | None:
    """Decode compressed or plain run lengths to pixels, with integers of unlimited size.

    An independent reference: it neither overflows nor shares code with the package's decoder.
    """
    if isinstance(counts, str):
        numbers, bits = [], ""
        for letter in counts:
            code = f"{ord(letter) - 48:06b}"
            bits = code[1:] + bits
            if code[0] == "0":
                # Two's complement
                numbers.append(int(bits, 2) - (bits[0] == "1") * 2 ** len(bits))
                bits = ""
        counts = numbers[:3]
        for number in numbers[3:]:
            counts.append(counts[-2] + number)
    ones = np.arange(len(counts)) % 2
    return np.repeat(ones, counts).astype(np.uint8)


@pytest.mark.parametrize("seed", [0, 1])
def test_accepted_rle_is_decoded_correctly_by_pycocotools(seed):
    """Thousands of random and damaged masks; accepted ones have the pixels of the reference."""
    run_in_child(__file__, "rle", seed)


def check_rle(seed: int) -> None:
    from hostile_annotations import hostile_counts

    limit_memory(4)
    rng, accepted = random.Random(seed), 0
    for _ in range(4000):
        height, width = rng.choice([(1, 1), (30, 40), (40, 30), (1, 300), (100, 1)])
        counts = hostile_counts(rng, height * width)
        mask, _ = take({"size": [height, width], "counts": counts}, (height, width))
        if mask is None:
            continue
        accepted += 1
        decoded = coco_mask.decode(mask)
        assert decoded.shape == (height, width)
        assert np.array_equal(decoded.T.ravel(), pixels_of(counts)), counts
        again = coco_mask.encode(np.asfortranarray(decoded))
        assert bounds_of(mask) == tuple(coco_mask.toBbox(again))
        assert coco_mask.iou([mask], [again], [0]) == 1
    assert accepted > 300


RUNS_33_BITS = "0" + "PPPPPP4" + "c0"
REJECTED_RLE = {
    "seven characters in a run": "P" * 6 + "0",
    "a run that overflows to the right length in 32 bits": RUNS_33_BITS,
    "an empty string": "",
    "a character beyond ASCII": "٣",
    "a byte of 0": "\0",
    "an incomplete number": "P",
    "one pixel too many": [1201],
    "a negative run": [-1, 1201],
    "too long runs with the right sum": [1300, -100],
    "a bool": [1199, True],
    "floats": [1200.0],
    "a huge number": [10**400],
    "a dict": {},
    "no counts": None,
}


@pytest.mark.parametrize("case", REJECTED_RLE)
def test_rejected_rle(case):
    mask, errors = take({"size": [30, 40], "counts": REJECTED_RLE[case]})
    assert mask is None and len(errors) == 1 and "mask 7" in errors[0]


@pytest.mark.parametrize("size", [[30.0, 40.0], [30, 40]])
def test_rle_size_is_converted_to_integers(size):
    mask, errors = take({"size": size, "counts": [0, 1, 1199]})
    assert [type(side) for side in mask["size"]] == [int, int] and not errors
    assert coco_mask.area(mask) == 1


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 0, 5, 10, 1180], [10, 10, 1180]),
        ([0, 5, 0, 5, 1190], [0, 10, 1190]),
        ([0, 0, 5, 5, 1190], [5, 5, 1190]),
        ([5, 5, 1190, 0], [5, 5, 1190]),
        ([5, 0, 0, 5, 1190], [5, 5, 1190]),
    ],
)
def test_runs_of_length_0_are_joined(counts, expected):
    """As pycocotools encodes them; with empty runs it computes wrong bounding boxes."""
    compressed = coco_mask.frPyObjects({"size": [30, 40], "counts": counts}, 30, 40)
    mask, _ = take({"size": [30, 40], "counts": counts})
    assert take({"size": [30, 40], "counts": compressed["counts"].decode()})[0] == mask
    edges = list(accumulate(expected))[:-1]
    flat = np.isin(np.arange(1200), edges).cumsum() % 2
    encoded = coco_mask.encode(np.asfortranarray(flat.reshape(40, 30).T.astype(np.uint8)))
    assert mask["counts"] == encoded["counts"].decode()


def zigzag(count: int, width: float) -> list[float]:
    return [value for i in range(count) for value in (i % 2 * width, i * 0.0001)]


REJECTED_POLYGONS = {
    "a coordinate of 1e8": [[*SQUARE, 1e8, 10]],
    "a coordinate of -1e8": [[*SQUARE, 10, -1e8]],
    "a far second polygon": [SQUARE, [v * 1000 for v in SQUARE]],
    "a huge integer": [[*SQUARE, 10**30, 10]],
    "two points, which pycocotools reads as a box": [SQUARE, [0, 0, 1e8, 1e8]],
    "a polygon outside the image": [[v + 100 for v in SQUARE]],
    "a line that fills the image twice": [zigzag(100, 40)],
    "many points": [SQUARE * 500_000],
    "many polygons": [SQUARE] * 100,
}


@pytest.mark.parametrize("case", REJECTED_POLYGONS)
def test_rejected_polygons(case):
    mask, errors = take(REJECTED_POLYGONS[case])
    assert mask is None and len(errors) == 1 and "mask 7" in errors[0]


def test_many_polygons_of_a_large_image_are_rejected():
    """The time for merging is proportional to their number times their length."""
    mask, errors = take([SQUARE] * 6000, (3000, 3000))
    assert mask is None and len(errors) == 1


@pytest.mark.parametrize("shift", [-40, 0, 50])
def test_polygons_that_extend_beyond_their_image_are_kept(shift):
    polygon = [float(x + shift) if i % 2 == 0 else x for i, x in enumerate(SQUARE)]
    mask, errors = take([polygon])
    assert mask == [polygon] and not errors


def test_a_comb_of_every_other_column_is_kept():
    """No outline along single pixels is longer."""
    comb = [value for x in range(0, 40, 2) for value in (x, 1, x, 30, x + 1, 30, x + 1, 1)]
    mask, errors = take([[*comb, 40, 0, 0, 0]])
    assert mask and not errors
    assert abs(area_of(mask, *SIZE) - (40 + 20 * 29)) <= 40


def test_accepted_polygons_can_be_drawn():
    run_in_child(__file__, "polygons")


def check_polygons() -> None:
    """Draw random polygons, and the longest accepted ones, with pycocotools and Detectron2."""
    import torch
    from detectron2.structures import PolygonMasks
    from hostile_annotations import NUMBERS

    limit_memory(8)
    rng, polygons = random.Random(0), []
    for _ in range(1000):
        count = rng.choice([1, 2, 2, 3, 4, 8, 13])
        drawn = [v for _ in range(count) for v in (rng.uniform(-45, 85), rng.uniform(-35, 65))]
        mixed = [rng.choice(NUMBERS) if rng.random() < 0.05 else value for value in drawn]
        polygons.append(take(rng.choice([[drawn], [mixed], [drawn, mixed]]))[0])
    polygons = [mask for mask in polygons if mask]
    assert len(polygons) > 50
    for mask in polygons:
        area_of(mask, *SIZE)
        arrays = [np.array(polygon, dtype=float) for polygon in mask]
        PolygonMasks([arrays]).crop_and_resize(torch.tensor([[10.0, 10, 20, 20]]), 28)
    worst, errors = take([zigzag(2900, 3000)], (3000, 3000))
    assert worst and not errors and length_of(worst) > 8e6
    area_of(worst, 3000, 3000)


@pytest.mark.parametrize(("side", "fatal"), [(0.01, True), (100, False)])
def test_long_masks_in_small_boxes(side, fatal):
    """Training scales masks so that their boxes are 28 pixels wide."""
    annotation = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [10, 10, side, side]}
    annotation |= {"segmentation": [zigzag(1000, 100)], "area": 5}
    findings = Findings()
    objects = list(clean_objects([annotation], {1: (3000, 3000)}, findings))
    assert bool(objects) is not fatal
    long_masks = [f for f in findings if f.description.startswith("masks") and f.fatal]
    assert [f.examples for f in long_masks] == [("7",)] * fatal


INVALID = {
    "without a box": {"bbox": [1, 1, 0, 5], "segmentation": [[*SQUARE, 1e8, 10]]},
    "without an id": {"id": None, "segmentation": SQUARE},
    "sizes that are not integers": {
        "segmentation": {"size": [30.0, 40.0], "counts": [0, 9, 1191]},
    },
    "with an area": {"area": 100, "segmentation": [[*SQUARE, 1e8, 10]]},
}


@pytest.mark.parametrize("case", INVALID)
def test_masks_of_a_file_that_is_used_without_cleaning(case, tmp_path):
    """Detectron2 and pycocotools read all masks, also those that cleaning would skip."""
    Image.new("L", SIZE[::-1]).save(tmp_path / "a.png")
    images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}]
    entry = {
        "id": 7,
        "image_id": 1,
        "category_id": 1,
        "bbox": [10, 10, 10, 10],
        **INVALID[case],
    }
    content = {"images": images, "annotations": [entry], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    findings = inspect_source(Source(tmp_path / "a.json", tmp_path))
    assert any(f.fatal and "masks" in f.description for f in findings)


if __name__ == "__main__":
    check_rle(int(sys.argv[2])) if sys.argv[1] == "rle" else check_polygons()
