"""`tools/benchmark.py` with small sizes: its measurements and output files."""

import json
import math

import pytest
import torch
from conftest import command
from detectron2.utils.events import EventStorage
from studies.rivals import build_rivals
from studies.timing import Times, interleave

RIVALS = ("Detectron2 GN", "gn_det GN, none", "gn_det GN, conv3", "torchvision, GN in the backbone")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("benchmark")
    words = ["--size", 64, 64, "--rounds", 1, "--images", 1, "--dtypes", "fp32"]
    parts = ["--parts", "operators", "R50-FPN"]
    done = command(
        "tools/benchmark.py",
        *parts,
        *words,
        "--output-dir",
        folder,
        "--only",
        *RIVALS,
        "fused",
        "native",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "results.md").read_text() in done.stdout.replace("\n\n\n", "\n\n")
    return json.loads((folder / "results.json").read_text())


def test_facts(results):
    assert {"device", "torch", "detectron2", "commit", "date", "size"} <= {*results["facts"]}


def test_operators(results):
    rows = results["operators"]
    assert {"fused", "native"} <= {row["operator"] for row in rows}
    # Stem, two kinds of layers in each of four stages, four FPN levels, two heads
    assert len({row["layer"] for row in rows}) == 1 + 8 + 4 + 2
    assert all(row["ms"] > 0 and row["bandwidth"] > 0 for row in rows)


def test_detectors(results):
    rows = {(row["rival"], row["way"]): row for row in results["R50-FPN"]}
    assert {name for name, _ in rows} == {"Detectron2 BN*", *RIVALS}
    baseline = rows["Detectron2 BN*", "train"]
    assert baseline["time ratio"] == baseline["memory ratio"] == 1
    memory = {name: row["memory ratio"] for (name, way), row in rows.items() if way == "train"}
    assert memory["gn_det GN, none"] == pytest.approx(memory["Detectron2 GN"], abs=0.02)
    assert 0.9 < memory["gn_det GN, conv3"] < memory["gn_det GN, none"]


def test_every_detector_gets_the_same_mask_work(results):
    """Where few proposals overlap an object, their number would depend on the random weights."""
    names = ("Detectron2 BN*", "gn_det GN, norm")
    rivals = build_rivals("R50-FPN", 1, (64, 96), torch.float32, "cpu", names)
    for rival in rivals.values():
        rival.model.train()
        with EventStorage() as storage:
            rival.model(rival.batch)
            # A quarter of MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, which is 64 on a CPU
            assert storage.latest()["roi_head/num_fg_samples"][0] == 16


def test_what_runs_out_of_memory_is_not_timed():
    def fail():
        raise torch.OutOfMemoryError("out of memory")

    times = interleave({"fails": fail, "works": lambda: None}, rounds=2)
    assert math.isnan(times["fails"].median) and times["works"].median >= 0


def test_unknown_names_are_refused(tmp_path):
    done = command("tools/benchmark.py", "--only", "gn_det GN, nrom", "--output-dir", tmp_path)
    assert done.returncode == 2 and "gn_det GN, nrom" in done.stderr


def test_no_measurement_starts_after_the_time_is_up(tmp_path):
    words = ["--everything", "--minutes", 0, "--output-dir", tmp_path]
    done = command("tools/benchmark.py", *words)
    assert done.returncode == 0 and "R50-C4, bf16, 2 images" in done.stdout
    assert not list(tmp_path.iterdir())


def test_steps_take_turns():
    order = []
    times = interleave({name: lambda n=name: order.append(n) for name in "ab"}, 3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert all(len(t.seconds) == 3 for t in times.values())


def test_median_and_spread():
    times = Times([1.0, 2.0, 3.0, 4.0, 100.0])
    assert times.median == 3.0
    assert times.spread == pytest.approx((52.0 - 1.5) / 3)
