"""What a report says of runs: folders made for it; tests/engine/test_demo.py has real ones."""

import json
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from gn_det.evaluation.report import Run, write_report

LINES = [
    {"iteration": 19, "time": 0.3, "total_loss": 3.0, "peak_memory_mib": 900.0},
    {"iteration": 39, "time": 9.0, "total_loss": 2.5, "peak_memory_mib": 950.0},
    # Interrupted, and resumed from iteration 30: iteration 39 comes again
    {"iteration": 39, "time": 0.1, "total_loss": 2.0, "peak_memory_mib": 800.0},
    {"iteration": 59, "time": 0.2, "total_loss": 1.0, "peak_memory_mib": 700.0},
    {"iteration": 60, "bbox/AP": 1.0, "segm/AP": 1.0},
]


@pytest.fixture
def runs(tmp_path, shapes) -> list[Run]:
    """One model that finds everything, and one that finds nothing."""
    truth = COCO(str(shapes / "instances_val.json"))
    perfect = []
    for a in truth.anns.values():
        rle = truth.annToRLE(a)
        if isinstance(rle["counts"], bytes):
            rle = {**rle, "counts": rle["counts"].decode()}
        keys = {key: a[key] for key in ("image_id", "category_id", "bbox")}
        perfect.append({**keys, "segmentation": rle, "score": 0.9})
    found = {"all <of it>": perfect, "nothing": []}
    for name, detections in found.items():
        folder = tmp_path / name
        (folder / "inference").mkdir(parents=True)
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, LINES)))
        record = {"seed": 0, "device": "abacus", "parameters": {"trainable": 1234, "frozen": 5}}
        record |= {"versions": {"torch": "2"}, "git_commit": None}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "inference/coco_instances_results.json").write_text(json.dumps(detections))
    return [Run(name, "somewhere", f"{name}.yaml", tmp_path / name) for name in reversed(found)]


def report(runs: list[Run], shapes: Path, output: Path) -> dict:
    about = {"title": "T", "text": "Text.", "facts": {"validation pictures": 6}}
    return write_report(runs, shapes / "instances_val.json", shapes / "images", output, about)


def test_numbers(runs, shapes, tmp_path):
    results = report(runs, shapes, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    nothing, everything = results["models"]
    assert nothing["bbox"]["AP"] == nothing["segm"]["AR100"] == 0
    assert everything["bbox"]["AP"] == everything["segm"]["AP"] == pytest.approx(100)
    # the resumed 0.1 replaces the abandoned 9.0
    assert nothing["seconds_per_iteration"] == 0.2
    assert nothing["peak_memory_mib"] == 900


def test_says_what_was_found(runs, shapes, tmp_path):
    report(runs, shapes, tmp_path)
    sentence = "nothing reaches box AP 0.0; all <of it> reaches 100.0, 100.0 points above it."
    assert sentence in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert sentence.replace("<of it>", "&lt;of it&gt;") in page
    assert "<of it>" not in page, "escaped"
    assert "abacus" in page and "1,234" in page
