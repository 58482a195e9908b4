"""`tools/replicate.py`: the recipes of its training runs, its rule, and its verdicts."""

import importlib.util
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from studies import claims
from studies.verdicts import (
    LEVEL,
    Runs,
    common_variance,
    compare,
    holm,
    judge,
)

from gn_det import check_config
from gn_det.errors import InputError

SPEC = importlib.util.spec_from_file_location("replicate", ROOT / "tools" / "replicate.py")
replicate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(replicate)

LARGER = replicate.Profile(2, 120, claims.LARGER_CLAIMS)
DETECTORS = claims.detectors_of(LARGER.claims)


@pytest.fixture
def replication(tmp_path, shapes):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "shapes").symlink_to(shapes)
    return replicate.Replication(tmp_path, LARGER, [0, 1], [])


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
def test_recipes(detector, replication):
    """Recipes have equal budgets; the checks refuse only the unchecked ones."""
    cfg = replication.fine_tuning(detector, 1).cfg
    assert cfg.SEED == 1
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.IMS_PER_BATCH) == (120 * detector.length, 4)
    rate = 0.04 if "GN" in detector.heads[2:] else 0.02
    assert (solver.BASE_LR, solver.ACCUMULATE_ITERS) == (rate, detector.passes)
    if detector.unchecked:
        keys = r"MODEL\.BACKBONE\.FREEZE_AT|SOLVER\.IMS_PER_BATCH|SOLVER\.ACCUMULATE_ITERS"
        with pytest.raises(InputError, match=keys):
            check_config(cfg)
    else:
        check_config(cfg)
    if detector.heads:
        parts = (cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD)
        assert tuple(part.NORM for part in parts) == detector.heads


def test_every_backbone_is_pretrained_with_its_own_norm_and_seed(replication):
    configs = {t.folder: t.cfg for t in replication.pretrainings()}
    assert len({id(cfg) for cfg in configs.values()}) == len(configs) == 14
    for detector in DETECTORS:
        cfg = replication.fine_tuning(detector, 1).cfg
        if detector.scratch:
            assert cfg.MODEL.WEIGHTS == ""
            continue
        (own,) = [c for folder, c in configs.items() if f"{folder}/" in cfg.MODEL.WEIGHTS]
        assert own.MODEL.RESNETS.NORM == cfg.MODEL.RESNETS.NORM.replace("Frozen", "")
        assert own.SEED == 1 and cfg.MODEL.RESNETS.DEPTH == own.MODEL.RESNETS.DEPTH
        assert cfg.MODEL.GROUP_NORM == own.MODEL.GROUP_NORM


@pytest.mark.parametrize("seeds", [[0], [1, 1]])
def test_too_few_seeds_are_refused(tmp_path, seeds):
    with pytest.raises(InputError, match="--seeds"):
        replicate.Replication(tmp_path, LARGER, seeds, [])


def test_verdicts(replication, shapes, tmp_path):
    """With perfect detections of some detectors, and none of the others."""
    truth = json.loads((shapes / "instances_val.json").read_text())
    box = [a for a in truth["annotations"] if not a["iscrowd"]]
    keys = ("image_id", "category_id", "bbox")
    perfect = [{**{k: a[k] for k in keys}, "score": 0.9} for a in box]
    # Boxes are right, masks are a pixel
    rle = {"size": [1, 1], "counts": "1"}
    perfect = [{**entry, "segmentation": rle} for entry in perfect]
    good = {"GN", "BN*, GN in the box head", "C4, GN", "C4, LN"}
    record = {"device": "abacus", "parameters": {}, "versions": {"torch": "2"}}
    record |= {"git_commit": None}
    for detector in DETECTORS:
        for seed in (0, 1):
            folder = replication.fine_tuning(detector, seed).folder
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "inference").mkdir(parents=True)
            detections = perfect if detector.name in good else []
            (folder / "inference/coco_instances_results.json").write_text(json.dumps(detections))
            (folder / "run.json").write_text(json.dumps({**record, "seed": seed}))
            (folder / "metrics.json").write_text('{"iteration": 1, "peak_memory_mib": 1.0}')
    results = replication.results()
    verdicts = {(c["above"], c["below"]): c["box"]["verdict"] for c in results["claims"]}
    assert verdicts["GN", "BN*"] == "holds" and verdicts["C4, GN", "C4, BN*"] == "holds"
    assert verdicts["GN, long", "GN"] == "does not hold"
    assert verdicts["C4, GN", "C4, LN"] == "undecided", "both are perfect"
    assert {c["mask"]["verdict"] for c in results["claims"]} == {"too little learned"}
    text = re.sub(" +", " ", replicate.markdown(results))
    assert "| 6 | GN everywhere is above BN* | 40.3 and 38.6 | +100.0 (+100.0 to +100.0)" in text
    replicate.plot(results).savefig(tmp_path / "plot.png")


def simulated(rng, levels, deviations, images, own, seeds) -> dict[str, Runs]:
    """Models with AP around `levels`: noise of the seeds, of the images, and of both."""
    runs = {}
    for i, (level, deviation) in enumerate(zip(levels, deviations, strict=True)):
        aps = level + rng.normal(0, images) + rng.normal(0, np.hypot(deviation, own), seeds)
        shared = rng.normal(0, images, (1, 300))
        runs[str(i)] = Runs(aps, aps[:, None] + shared + rng.normal(0, own, (seeds, 300)))
    return runs


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("differ", "images", "own"), [(0.0, 0.5, 0.0), (0.3, 0.7, 1.0), (0.5, 0.5, 0.5)]
)
def test_coverage(seeds, differ, images, own):
    """About 95% of the intervals cover the true difference.

    The models' standard deviations over seeds are 1.8 times e to a normal number times `differ`.
    """
    rng, covered = np.random.default_rng(seeds), []
    for _ in range(120):
        levels = rng.normal(20, 5, 12)
        deviations = 1.8 * np.exp(rng.normal(0, differ, 12))
        runs = simulated(rng, levels, deviations, images, own, seeds)
        prior = common_variance([r.aps for r in runs.values()])
        for i in range(0, 12, 2):
            gap = compare(runs[str(i)], runs[str(i + 1)], prior)
            covered.append(gap.low <= levels[i + 1] - levels[i] <= gap.high)
    # Of 720 intervals, 3 standard deviations around 93 to 97%
    assert 0.93 - 0.028 <= np.mean(covered) <= 0.97 + 0.02


def test_equal_models_are_rarely_told_apart():
    """In at most 1 of 20 replications a verdict is wrong, with all pairs counted."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        runs = simulated(rng, [20.0] * 8, [1.8] * 8, 0.5, 0.5, 3)
        names = {("bbox", name): r for name, r in runs.items()}
        found = judge(names, [("0", str(i)) for i in range(1, 8)], {"bbox": "box"})
        wrong += any(f["box"]["verdict"] != "undecided" for f in found)
    assert wrong / 60 <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / 60)


def test_a_clear_difference_is_seen():
    rng = np.random.default_rng(0)
    runs = simulated(rng, [20.0, 21, 19, 20, 40, 20], [1.8] * 6, 0.5, 0.5, 3)
    names = {("bbox", name): r for name, r in runs.items()}
    (up, down) = judge(names, [("4", "0"), ("0", "4")], {"bbox": "box"})
    assert up["box"]["verdict"] == "holds" and down["box"]["verdict"] == "does not hold"
    assert up["box"]["low"] < 20 < up["box"]["high"]


def test_moderated_variance():
    """Of equal variances the prior is their common value, however large the sample is."""
    aps = [np.array([10.0, 12, 14]) + i for i in range(6)]
    prior = common_variance(aps)
    # E log of a sample variance with 2 degrees of freedom is digamma(1) below the log of the true
    expected = 4 / math.exp(torch.digamma(torch.tensor(1.0)).item())
    assert prior.variance == pytest.approx(expected, rel=1e-6)
    differing = [np.array([10.0, 10 + d, 10 - d]) for d in (0.01, 0.1, 1, 10, 100)]
    assert common_variance(differing).freedom < prior.freedom


def test_holm():
    """The example of Holm's method: 0.01 x 4, 0.02 x 3, 0.03 x 2, and the largest so far."""
    values = [0.03, 0.01, 0.04, 0.02]
    assert holm(values) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
