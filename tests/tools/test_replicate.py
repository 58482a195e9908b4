"""`tools/replicate.py`: the recipes of its training runs, and its verdicts."""

import importlib.util
import json
import re
import shutil

import pytest
from conftest import ROOT

from gn_det import check_config
from gn_det.errors import InputError

SPEC = importlib.util.spec_from_file_location("replicate", ROOT / "tools" / "replicate.py")
replicate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(replicate)


@pytest.fixture
def replication(tmp_path, shapes):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "shapes").symlink_to(shapes)
    return replicate.Replication(tmp_path, 480, [0, 1], [])


@pytest.mark.parametrize("detector", replicate.DETECTORS, ids=lambda d: d.name)
def test_recipes(detector, replication):
    """Recipes have equal budgets and rates; the checks refuse only the unchecked ones."""
    cfg = replication.fine_tuning(detector, 1).cfg
    assert cfg.SEED == 1
    assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == 480 * detector.length
    assert pytest.approx(0.01 * cfg.SOLVER.IMS_PER_BATCH) == cfg.SOLVER.BASE_LR
    if detector.unchecked:
        with pytest.raises(InputError, match=r"MODEL\.BACKBONE\.FREEZE_AT|SOLVER\.IMS_PER_BATCH"):
            check_config(cfg)
    else:
        check_config(cfg)
    if detector.heads:
        parts = (cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD)
        assert tuple(part.NORM for part in parts) == detector.heads


def test_every_backbone_is_pretrained_with_its_own_norm(replication):
    configs = {t.folder: t.cfg for t in replication.pretrainings()}
    for detector in replicate.DETECTORS:
        cfg = replication.fine_tuning(detector, 0).cfg
        if detector.scratch:
            assert cfg.MODEL.WEIGHTS == ""
            continue
        (own,) = [c for folder, c in configs.items() if f"{folder}/" in cfg.MODEL.WEIGHTS]
        assert own.MODEL.RESNETS.NORM == cfg.MODEL.RESNETS.NORM.replace("Frozen", "")
        assert cfg.MODEL.RESNETS.DEPTH == own.MODEL.RESNETS.DEPTH
        assert cfg.MODEL.GROUP_NORM == own.MODEL.GROUP_NORM


def test_verdicts(replication, shapes, tmp_path, monkeypatch):
    """With perfect detections of some detectors, and none of the others."""
    truth = json.loads((shapes / "instances_val.json").read_text())
    box = [a for a in truth["annotations"] if not a["iscrowd"]]
    keys = ("image_id", "category_id", "bbox")
    perfect = [{**{k: a[k] for k in keys}, "score": 0.9} for a in box]
    rle = {"size": [1, 1], "counts": "1"}
    perfect = [{**entry, "segmentation": rle} for entry in perfect]
    good = {replicate.GN, replicate.BOX_GN, replicate.C4_GN, replicate.C4_LN}
    record = {"seed": 0, "device": "abacus", "parameters": {}, "versions": {"torch": "2"}}
    record |= {"git_commit": None}
    for detector in replicate.DETECTORS:
        for seed in (0, 1):
            folder = replication.fine_tuning(detector, seed).folder
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "inference").mkdir(parents=True)
            detections = perfect if detector in good else []
            (folder / "inference/coco_instances_results.json").write_text(json.dumps(detections))
            (folder / "run.json").write_text(json.dumps(record))
            (folder / "metrics.json").write_text('{"iteration": 1, "peak_memory_mib": 1.0}')
    results = replication.results()
    verdicts = {(c["above"], c["below"]): c["verdict"] for c in results["claims"]}
    assert verdicts["GN", "BN*"] == "holds" and verdicts["C4, GN", "C4, BN*"] == "holds"
    assert verdicts["GN, long", "GN"] == "does not hold"
    assert verdicts["C4, GN", "C4, LN"] == "inconclusive", "both are perfect"
    text = re.sub(" +", " ", replicate.markdown(results))
    assert "| 6 | GN everywhere is above BN* (40.3 and 38.6) | +100.0 | +100.0 to +100.0 |" in text
    replicate.plot(results).savefig(tmp_path / "plot.png")
