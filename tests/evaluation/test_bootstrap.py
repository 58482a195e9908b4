"""The AP of resamples against pycocotools on data sets with copied pictures; the intervals."""

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
    paired_difference,
)
from gn_det.evaluation.coco_stats import load_coco

KNOWN = ROOT.parent / "shared/data/cocoeval_fixture"
SIZE = 64
PICTURES = 14
EMPTY = (2, 9)


def region(x: float, y: float, w: float, h: float) -> dict:
    """A rectangle inside of the picture, as box and as mask."""
    x, y = (int(np.clip(v, 0, SIZE - 5)) for v in (x, y))
    w, h = int(np.clip(w, 4, SIZE - x)), int(np.clip(h, 4, SIZE - y))
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(mask)
    return {"bbox": [x, y, w, h], "segmentation": {**rle, "counts": rle["counts"].decode()}}


def random_truth(rng) -> dict:
    """Objects of categories 1, 2 and 5 and crowds, and some pictures with nothing."""
    # Not in the order of the ids
    images = [{"id": int(i), "height": SIZE, "width": SIZE} for i in rng.permutation(PICTURES)]
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
    """Shifted objects, twins, crowds' members and inventions; scores are equal across pictures."""
    found = []
    for a in truth["annotations"]:
        for _ in range(6 if a["iscrowd"] else 2):
            if rng.random() < skill:
                where = region(*(np.array(a["bbox"]) + rng.normal(0, 1.5, 4)))
                found.append({k: a[k] for k in ("image_id", "category_id")} | where)
    for i in range(6 * PICTURES):
        where = region(*rng.uniform(0, 60, 2), *rng.uniform(4, 30, 2))
        # The first picture has more detections than count
        image_id = 0 if i < 2 * PICTURES else int(rng.integers(PICTURES))
        category_id = int(rng.choice([1, 2, 5, 7]))
        found.append({"image_id": image_id, "category_id": category_id, **where})
    for image_id in range(PICTURES):
        for category_id in (1, 2, 5, 7):
            pair = {"image_id": image_id, "category_id": category_id}
            same = [d for d in found if pair.items() <= d.items()]
            levels = rng.integers(10, size=len(same)) if tied else rng.permutation(40)
            for entry, level in zip(same, levels, strict=False):
                entry["score"] = float(level / 40)
    return found


def crowd_one_image(rng, found: list[dict]) -> list[dict]:
    """More detections of one category in one picture than COCO counts."""
    others = [d for d in found if (d["image_id"], d["category_id"]) != (3, 1)]
    many = [region(*rng.uniform(0, 60, 2), *rng.uniform(4, 30, 2)) for _ in range(130)]
    pair = {"image_id": 3, "category_id": 1}
    scores = rng.permutation(160) / 160
    return others + [{**pair, **d, "score": float(s)} for d, s in zip(many, scores, strict=False)]


def copied(truth: dict, found: list[dict], weights: np.ndarray) -> tuple[dict, list[dict]]:
    """The data set in which picture i is there weights[i] times, and its detections."""
    images, annotations, detections = [], [], []
    for image, weight in zip(sorted(truth["images"], key=lambda e: e["id"]), weights, strict=True):
        for _ in range(weight):
            new = {"image_id": len(images)}
            images.append({**image, "id": len(images)})
            for a in truth["annotations"]:
                if a["image_id"] == image["id"]:
                    annotations.append({**a, **new, "id": len(annotations) + 1})
            detections += [{**d, **new} for d in found if d["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, detections


def reference_ap(truth: dict, found: list[dict], iou_type: str) -> float:
    """The AP that pycocotools prints."""
    coco = COCO()
    coco.dataset = json.loads(json.dumps(truth))
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(found))), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.nan if evaluation.stats[0] < 0 else 100 * evaluation.stats[0]


@pytest.fixture
def match(tmp_path):
    """Write a data set and detections, and match them."""

    def written(truth: dict, found: list[dict], iou_type: str = "bbox") -> ImageMatches:
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        (tmp_path / "found.json").write_text(json.dumps(found))
        return ImageMatches.from_results(tmp_path / "truth.json", tmp_path / "found.json", iou_type)

    return written


def recalled(found: np.ndarray) -> ImageMatches:
    """Matches of a model that finds the one object of some pictures, and invents nothing."""
    pictures, nothing = np.flatnonzero(found), np.arange(0)
    category = CategoryMatches(
        objects=np.arange(len(found)),
        pictures=pictures,
        hits=[np.arange(len(pictures))] * 10,
        ignored=[nothing] * 10,
    )
    return ImageMatches(np.arange(len(found)), [category])


@pytest.mark.parametrize(("iou_type", "expected"), [("bbox", 50.4581), ("segm", 31.9545)])
def test_known_ap(iou_type, expected):
    if not KNOWN.exists():
        pytest.skip(f"no {KNOWN}: the detections with published AP are not here")
    truth = load_coco(KNOWN / "instances_val2014_100.json")
    results = KNOWN / f"instances_val2014_fake{iou_type}100_results.json"
    matches = ImageMatches.from_results(truth, results, iou_type)
    assert matches.ap(np.ones(len(truth.imgs))) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_each_image_once(match, iou_type, seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    found = crowd_one_image(rng, random_detections(rng, truth, tied=True))
    ap = match(truth, found, iou_type).ap(np.ones(PICTURES))
    assert ap == pytest.approx(reference_ap(truth, found, iou_type), rel=1e-12)
    assert 5 < ap < 95


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_copied_images(match, iou_type, seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    found = crowd_one_image(rng, random_detections(rng, truth))
    matches = match(truth, found, iou_type)
    assert list(matches.image_ids) == list(range(PICTURES))
    weights = rng.multinomial(PICTURES, np.full(PICTURES, 1 / PICTURES), size=4)
    # One category is not in any picture that is left.
    rare = {a["image_id"] for a in truth["annotations"] if a["category_id"] == 5}
    assert rare
    weights[-1, list(rare)] = 0
    expected = [reference_ap(*copied(truth, found, w), iou_type) for w in weights]
    assert [matches.ap(w) for w in weights] == pytest.approx(expected, rel=1e-12)
    assert list(matches.resampled_ap(weights)) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == 4


def test_chunks_make_no_difference(match, monkeypatch):
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    matches = match(truth, random_detections(rng, truth))
    weights = rng.integers(3, size=(50, PICTURES))
    whole = matches.resampled_ap(weights)
    for chunk in (1, 2000):
        monkeypatch.setattr("gn_det.evaluation.bootstrap.CHUNK", chunk)
        np.testing.assert_array_equal(matches.resampled_ap(weights), whole)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_nothing_there(match, iou_type):
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    found = random_detections(rng, truth)
    matches, blind = match(truth, found, iou_type), match(truth, [], iou_type)
    assert blind.ap(np.ones(PICTURES)) == 0
    assert np.isnan(matches.ap(np.isin(np.arange(PICTURES), EMPTY)))
    difference = paired_difference([blind], [matches], draws=50)
    assert difference.mean == pytest.approx(matches.ap(np.ones(PICTURES)))
    assert difference.seen
    empty = match({**truth, "annotations": []}, found, iou_type)
    assert np.isnan(empty.ap(np.ones(PICTURES)))


def test_better_model_is_seen(match):
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    worse, better = (
        [match(truth, random_detections(rng, truth, skill)) for _ in range(3)]
        for skill in (0.2, 0.9)
    )
    for model in (worse, better):
        assert paired_difference(model, model, draws=50) == Difference(0, 0, 0)
    assert not Difference(0, 0, 0).seen
    gain = paired_difference(worse, better, draws=200)
    everything = np.ones(PICTURES)
    aps = [[m.ap(everything) for m in model] for model in (worse, better)]
    assert gain.mean == pytest.approx(np.mean(aps[1]) - np.mean(aps[0]))
    assert 0 < gain.low < gain.mean < gain.high
    assert gain.seen
    loss = paired_difference(better, worse, draws=200)
    assert (loss.mean, loss.low, loss.high) == pytest.approx((-gain.mean, -gain.high, -gain.low))
    assert loss.seen
    assert paired_difference(worse, better, draws=200, seed=1).low != gain.low


def test_seeds_are_resampled():
    """Where all pictures agree, only the pairs that are drawn make a difference."""
    full, none = recalled(np.ones(20)), recalled(np.zeros(20))
    assert paired_difference([none] * 3, [full] * 3) == Difference(100, 100, 100)
    assert paired_difference([none, full], [full, none]) == Difference(0, -100, 100)
    # Of 4 draws from one gain and 3 ties, 3 gains have a chance of 5 %, and 4 of 0.4 %. So the
    # bootstrap's interval is 0 to 75, which is then widened as Student's t is
    one_of_four = paired_difference([none] * 4, [full, none, none, none])
    wider = 3.182 / 1.96 * (4 / 3) ** 0.5
    assert one_of_four.mean == 25 and one_of_four.low == pytest.approx(25 - 25 * wider)
    assert one_of_four.high == min(25 + 50 * wider, 100)


class Fixed:
    """A model whose AP is the same on every resample."""

    image_ids = np.arange(5)

    def __init__(self, ap: float) -> None:
        self.resampled_ap = lambda weights: np.full(len(weights), ap)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_few_seeds_are_not_trusted(seeds):
    """Of seeds that differ at random, with no true difference, about 1 interval in 20 misses 0."""
    rng, missed = np.random.default_rng(seeds), 0
    for trial in range(400):
        baseline, other = rng.normal(40, 2, (2, seeds))
        pairs = [[Fixed(ap) for ap in model] for model in (baseline, other)]
        missed += paired_difference(*pairs, draws=300, seed=trial).seen
    assert missed < 0.09 * 400


def test_interval_covers_the_truth():
    """A model's AP is its recall here, so that the true difference is known."""
    rng = np.random.default_rng(0)
    truth = 100 * (0.7 - 0.6) * 100 / 101
    covered = []
    for seed in range(150):
        baseline, other = (recalled(rng.random(100) < p) for p in (0.6, 0.7))
        found = paired_difference([baseline], [other], draws=200, seed=seed)
        covered.append(found.low <= truth <= found.high)
    # 95 % of 150, give or take 3 standard deviations
    assert 0.9 <= np.mean(covered) <= 0.993


def test_unpaired_results_are_refused():
    matches, fewer = recalled(np.ones(5)), recalled(np.ones(4))
    for baseline, other in (([matches] * 3, [matches] * 2), ([], [])):
        counts = rf"same seeds.* {len(baseline)} results .* and {len(other)} of"
        with pytest.raises(InputError, match=counts):
            paired_difference(baseline, other)
    with pytest.raises(InputError, match="same pictures"):
        paired_difference([matches] * 2, [matches, fewer])
