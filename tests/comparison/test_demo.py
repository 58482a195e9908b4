"""`tools/demo.py` on a small dataset: interrupted, resumed, and its report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, command, enable_sigint

from gn_det.data import make_shapes
from gn_det.evaluation.coco_stats import STATS

KEYS = {
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": "(4,)",
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "TEST.EVAL_PERIOD": 3,
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64,
    "PRETRAIN.EPOCHS": 1,
    "PRETRAIN.STEPS": "()",
    "PRETRAIN.IMAGE_SIZE": 32,
}
OPTS = [str(word) for pair in KEYS.items() for word in pair]
MODELS = ("mask_rcnn_R_18_FPN_frozenbn", "mask_rcnn_R_18_FPN_gn", "mask_rcnn_R_18_FPN_bn")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """A demo that was interrupted in its second fine-tuning run, and then resumed."""
    output = tmp_path_factory.mktemp("demo") / "demo"
    make_shapes(output / "datasets" / "shapes", num_train=8, num_val=4, seed=1)
    words = [sys.executable, "tools/demo.py", "--output-dir", str(output), *OPTS]
    silence = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=ROOT, preexec_fn=enable_sigint, **silence)
    deadline = time.monotonic() + 240
    while not (output / MODELS[1] / "config.yaml").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not (output / "results.json").exists()
    done = command("tools/demo.py", "--output-dir", output, *OPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


def test_resume_keeps_finished_runs(demo):
    _, printed = demo
    for name in ("pretrain_R_18_bn", "pretrain_R_18_gn", MODELS[0]):
        assert f"{name}: already finished" in printed
    assert f"{MODELS[2]}: already finished" not in printed
    assert re.search(r"eta: \S+  iter: \d+  total_loss: ", printed)


def test_results(demo):
    output, _ = demo
    results = json.loads((output / "results.json").read_text())
    assert [m["model"] for m in results["models"]] == ["BN*", "GN", "BN"]
    for model, name in zip(results["models"], MODELS, strict=True):
        assert set(model["bbox"]) == set(model["segm"]) == {*STATS, "classes"}
        config = f"configs/Shapes/{name}.yaml"
        assert f"{model['model']}: {config}" in results["facts"]["configs"]
        assert (ROOT / config).is_file()
        assert model["seconds_per_iteration"] > 0 and model["peak_memory_mib"] > 100
        assert model["parameters"]["trainable"] > 1_000_000
    for run in results["runs"]:
        assert run["seed"] == 0 and set(run["versions"]) >= {"torch", "detectron2"}
    # gamma and beta are parameters of GN, and frozen buffers of BN*
    frozen, gn, _ = (m["parameters"] for m in results["models"])
    assert gn["trainable"] > frozen["trainable"]


def test_report_is_self_contained(demo):
    output, _ = demo
    page = (output / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 3, "loss, box AP and mask AP"
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "no external resources"
    results = json.loads((output / "results.json").read_text())
    images = len(re.findall(r'<img src="data:image/jpeg;base64,', page))
    assert images % 4 == 0 and images > 0, "ground truth and three models"
    text = (output / "report.md").read_text()
    for model in results["models"]:
        ap = f"{model['bbox']['AP']['mean']:.1f}"
        assert f"| {model['model']} | {model['where']} | 1 | {ap} |" in text
        assert ap in page


def test_other_settings_are_refused(demo):
    output, _ = demo
    done = command("tools/demo.py", "--output-dir", output, *OPTS, "SOLVER.BASE_LR", 0.1)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {output} .*config\.yaml differs.*--output-dir\n", done.stderr)


def test_output_folder_is_not_writable():
    done = command("tools/demo.py", "--output-dir", "/dev/null/demo")
    assert done.returncode == 1
    assert re.fullmatch("error: .*/dev/null/demo: .*\n", done.stderr)


def test_error_of_a_failed_run(tmp_path):
    """The message has the error of the run."""
    make_shapes(tmp_path / "datasets" / "shapes", num_train=2, num_val=1)
    groups = ["MODEL.GROUP_NORM.NUM_GROUPS", "24"]
    done = command("tools/demo.py", "--output-dir", tmp_path, *OPTS, *groups, env=dict(os.environ))
    assert done.returncode == 1
    assert re.match(r"error: pretrain_R_18_gn failed, .*/log\.txt: .*\b64 channels", done.stderr)
