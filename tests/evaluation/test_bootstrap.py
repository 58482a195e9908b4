"""AP of resamples, compared with pycocotools on copied images; coverage of the intervals."""

import json

import numpy as np
import pytest
from conftest import ROOT
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gn_det.errors import InputError
from gn_det.evaluation.bootstrap import (
    CategoryMatches,
    Difference,
    ImageMatches,
    combined_half_width,
    paired_difference,
    student_quantile,
)
from gn_det.evaluation.coco_stats import load_coco

KNOWN = ROOT.parent / "shared/data/cocoeval_fixture"
SIZE = 64
IMAGES = 14
EMPTY = (2, 9)


def region(x: float, y: float, w: float, h: float) -> dict:
    """A rectangle inside the image, as box and mask."""
    x, y = (int(np.clip(v, 0, SIZE - 5)) for v in (x, y))
    w, h = int(np.clip(w, 4, SIZE - x)), int(np.clip(h, 4, SIZE - y))
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(mask)
    return {"bbox": [x, y, w, h], "segmentation": {**rle, "counts": rle["counts"].decode()}}


def random_truth(rng) -> dict:
    """Objects and crowds of categories 1, 2 and 5, and some empty images."""
    # In random order of the ids
    images = [{"id": int(i), "height": SIZE, "width": SIZE} for i in rng.permutation(IMAGES)]
    annotations = []
    for image in images:
        if image["id"] in EMPTY:
            continue
        for crowd in (*[0] * int(rng.integers(1, 5)), *[1] * int(rng.integers(2))):
            where = region(*rng.uniform(0, 40, 2), *rng.uniform(8, 30 + 20 * crowd, 2))
            entry = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": int(rng.choice([1, 2, 5], p=[0.5, 0.4, 0.1])),
                "iscrowd": crowd,
                "area": where["bbox"][2] * where["bbox"][3],
            }
            annotations.append({**entry, **where})
    categories = [{"id": i, "name": str(i)} for i in (5, 1, 2, 7, 9)]
    return {"images": images, "annotations": annotations, "categories": categories}


def random_detections(rng, truth: dict, skill: float = 0.7, tied: bool = False) -> list[dict]:
    """Shifted, duplicate, crowd and false detections; scores may be equal across images."""
    detections = []
    for a in truth["annotations"]:
        for _ in range(6 if a["iscrowd"] else 2):
            if rng.random() < skill:
                where = region(*(np.array(a["bbox"]) + rng.normal(0, 1.5, 4)))
                detections.append({k: a[k] for k in ("image_id", "category_id")} | where)
    for i in range(6 * IMAGES):
        where = region(*rng.uniform(0, 60, 2), *rng.uniform(4, 30, 2))
        # The first image has more detections than COCO counts
        image_id = 0 if i < 2 * IMAGES else int(rng.integers(IMAGES))
        category_id = int(rng.choice([1, 2, 5, 7]))
        detections.append({"image_id": image_id, "category_id": category_id, **where})
    for image_id in range(IMAGES):
        for category_id in (1, 2, 5, 7):
            pair = {"image_id": image_id, "category_id": category_id}
            same = [d for d in detections if pair.items() <= d.items()]
            levels = rng.integers(10, size=len(same)) if tied else rng.permutation(40)
            for entry, level in zip(same, levels, strict=False):
                entry["score"] = float(level / 40)
    return detections


def crowd_one_image(rng, detections: list[dict]) -> list[dict]:
    """Give one image more detections of one category than COCO counts."""
    others = [d for d in detections if (d["image_id"], d["category_id"]) != (3, 1)]
    many = [region(*rng.uniform(0, 60, 2), *rng.uniform(4, 30, 2)) for _ in range(130)]
    pair = {"image_id": 3, "category_id": 1}
    scores = rng.permutation(160) / 160
    return others + [{**pair, **d, "score": float(s)} for d, s in zip(many, scores, strict=False)]


def copied(truth: dict, given: list[dict], weights: np.ndarray) -> tuple[dict, list[dict]]:
    """A dataset with weights[i] copies of image i, and its detections."""
    images, annotations, detections = [], [], []
    for image, weight in zip(sorted(truth["images"], key=lambda e: e["id"]), weights, strict=True):
        for _ in range(weight):
            new = {"image_id": len(images)}
            images.append({**image, "id": len(images)})
            for a in truth["annotations"]:
                if a["image_id"] == image["id"]:
                    annotations.append({**a, **new, "id": len(annotations) + 1})
            detections += [{**d, **new} for d in given if d["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, detections


def reference_ap(truth: dict, detections: list[dict], iou_type: str) -> float:
    """AP of pycocotools."""
    coco = COCO()
    coco.dataset = json.loads(json.dumps(truth))
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(detections))), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.nan if evaluation.stats[0] < 0 else 100 * evaluation.stats[0]


@pytest.fixture
def match(tmp_path):
    """Write a dataset and detections to files, and match them."""

    def match_files(truth: dict, detections: list[dict], iou_type: str = "bbox") -> ImageMatches:
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        results = tmp_path / "results.json"
        results.write_text(json.dumps(detections))
        return ImageMatches.from_results(tmp_path / "truth.json", results, iou_type)

    return match_files


def recalled(detected: np.ndarray) -> ImageMatches:
    """Matches for one object per image, detected in some images, without false positives."""
    images, none = np.flatnonzero(detected), np.arange(0)
    category = CategoryMatches(
        objects=np.arange(len(detected)),
        images=images,
        hits=[np.arange(len(images))] * 10,
        ignored=[none] * 10,
    )
    return ImageMatches(np.arange(len(detected)), [category])


@pytest.mark.parametrize(("iou_type", "expected"), [("bbox", 50.4581), ("segm", 31.9545)])
def test_known_ap(iou_type, expected):
    if not KNOWN.exists():
        pytest.skip(f"no {KNOWN}: the detections with published AP are missing")
    truth = load_coco(KNOWN / "instances_val2014_100.json")
    results = KNOWN / f"instances_val2014_fake{iou_type}100_results.json"
    matches = ImageMatches.from_results(truth, results, iou_type)
    assert matches.ap(np.ones(len(truth.imgs))) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_each_image_once(match, iou_type, seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    detections = crowd_one_image(rng, random_detections(rng, truth, tied=True))
    ap = match(truth, detections, iou_type).ap(np.ones(IMAGES))
    assert ap == pytest.approx(reference_ap(truth, detections, iou_type), rel=1e-12)
    assert 5 < ap < 95


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_copied_images(match, iou_type, seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    detections = crowd_one_image(rng, random_detections(rng, truth))
    matches = match(truth, detections, iou_type)
    assert list(matches.image_ids) == list(range(IMAGES))
    weights = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=4)
    # The last resample has no image with category 5
    rare = {a["image_id"] for a in truth["annotations"] if a["category_id"] == 5}
    assert rare
    weights[-1, list(rare)] = 0
    expected = [reference_ap(*copied(truth, detections, w), iou_type) for w in weights]
    assert [matches.ap(w) for w in weights] == pytest.approx(expected, rel=1e-12)
    assert list(matches.resampled_ap(weights)) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == 4


def test_chunk_size_does_not_change_ap(match, monkeypatch):
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    matches = match(truth, random_detections(rng, truth))
    weights = rng.integers(3, size=(50, IMAGES))
    expected = matches.resampled_ap(weights)
    for chunk in (1, 2000):
        monkeypatch.setattr("gn_det.evaluation.bootstrap.CHUNK", chunk)
        np.testing.assert_array_equal(matches.resampled_ap(weights), expected)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_no_detections_or_no_objects(match, iou_type):
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    detections = random_detections(rng, truth)
    matches, blind = match(truth, detections, iou_type), match(truth, [], iou_type)
    assert blind.ap(np.ones(IMAGES)) == 0
    assert np.isnan(matches.ap(np.isin(np.arange(IMAGES), EMPTY)))
    difference = paired_difference([blind], [matches], draws=50)
    assert difference.mean == pytest.approx(matches.ap(np.ones(IMAGES)))
    assert difference.significant
    empty = match({**truth, "annotations": []}, detections, iou_type)
    assert np.isnan(empty.ap(np.ones(IMAGES)))


def test_difference_of_a_better_model_is_significant(match):
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    worse, better = (
        [match(truth, random_detections(rng, truth, skill)) for _ in range(3)]
        for skill in (0.2, 0.9)
    )
    for model in (worse, better):
        assert paired_difference(model[:1], model[:1], draws=50) == Difference(0, 0, 0)
    assert not Difference(0, 0, 0).significant
    gain = paired_difference(worse, better, draws=200)
    everything = np.ones(IMAGES)
    aps = [[m.ap(everything) for m in model] for model in (worse, better)]
    assert gain.mean == pytest.approx(np.mean(aps[1]) - np.mean(aps[0]))
    assert 0 < gain.low < gain.mean < gain.high
    assert gain.significant
    loss = paired_difference(better, worse, draws=200)
    assert (loss.mean, loss.low, loss.high) == pytest.approx((-gain.mean, -gain.high, -gain.low))
    assert loss.significant
    assert paired_difference(worse, better, draws=200, seed=1).low != gain.low


def test_seeds_without_noise_of_images():
    """Student's interval of two samples, with values from its table."""
    full, none = recalled(np.ones(20)), recalled(np.zeros(20))
    assert paired_difference([none] * 3, [full] * 3) == Difference(100, 100, 100)
    gap = paired_difference([Fixed(30), Fixed(34)], [Fixed(41), Fixed(43)])
    # Variances 8 and 2 over 2 seeds each, 2 degrees of freedom
    half = 4.303 * ((8 + 2) / 2) ** 0.5
    assert (gap.mean, gap.low, gap.high) == pytest.approx((10, 10 - half, 10 + half), abs=0.01)
    assert paired_difference([none, full], [full, none]) == Difference(0, -100, 100)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (8, 2.306), (30, 2.042)]
)
def test_quantiles_of_student(freedom, expected):
    assert student_quantile(freedom) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("noisier", "own"), [(1, 0), (2, 0), (1, 2)])
def test_coverage(seeds, ratio, noisier, own):
    """About 95% of the intervals cover a true difference, whatever the noise comes from.

    Noise of the seeds is `ratio` times that of the common images, and that of the second model
    `noisier` times larger. `own` is the noise of images that differs from seed to seed.
    """
    rng = np.random.default_rng(seeds)
    truth, covered, trials = 4.0, 0, 2000
    for _ in range(trials):
        aps = np.stack(
            [
                rng.normal(level, (scale**2 * ratio**2 + own**2 / 2) ** 0.5, seeds)
                for level, scale in ((40.0, 1.0), (40.0 + truth, noisier))
            ]
        )
        gap = aps[1].mean() - aps[0].mean() + rng.normal()
        half = combined_half_width(aps, 1 + own**2 / seeds, 1 + own**2)
        covered += abs(gap - truth) <= half
    assert 0.93 <= covered / trials <= 0.985


class Fixed:
    """A model whose AP is the same on every resample."""

    image_ids = np.arange(5)

    def __init__(self, ap: float) -> None:
        self.resampled_ap = lambda weights: np.full(len(weights), ap)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_false_positive_rate_of_few_seeds(seeds):
    """Without a true difference, about 1 interval in 20 excludes 0."""
    rng, missed = np.random.default_rng(seeds), 0
    for trial in range(400):
        baseline, other = rng.normal(40, 2, (2, seeds))
        pairs = [[Fixed(ap) for ap in model] for model in (baseline, other)]
        missed += paired_difference(*pairs, draws=300, seed=trial).significant
    assert missed < 0.09 * 400


def test_interval_covers_the_truth():
    """AP is about the recall here, so the true difference is known."""
    rng = np.random.default_rng(0)
    truth = 100 * (0.7 - 0.6) * 100 / 101
    covered = []
    for seed in range(150):
        baseline, other = (recalled(rng.random(100) < p) for p in (0.6, 0.7))
        gap = paired_difference([baseline], [other], draws=200, seed=seed)
        covered.append(gap.low <= truth <= gap.high)
    # 95% of 150, within 3 standard deviations
    assert 0.9 <= np.mean(covered) <= 0.993


def test_unpaired_results_are_refused():
    matches, fewer = recalled(np.ones(5)), recalled(np.ones(4))
    for baseline, other in (([matches] * 3, [matches] * 2), ([], [])):
        counts = rf"same seeds.* {len(baseline)} results .* and {len(other)} of"
        with pytest.raises(InputError, match=counts):
            paired_difference(baseline, other)
    with pytest.raises(InputError, match="same images"):
        paired_difference([matches] * 2, [matches, fewer])
