"""`tools/train_net.py` trains, stops on Ctrl-C, resumes, evaluates and reports errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, SCRATCH, TINY, command, enable_sigint, shapes_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

import gn_det.files as files_module
from gn_det.config_file import read_config
from gn_det.engine.resume import check_resumed_config
from gn_det.engine.train import run
from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError
from gn_det.files import locked

TRAIN = ("tools/train_net.py", "--config-file", "configs/Shapes/mask_rcnn_R_18_FPN_gn.yaml")


def opts(output: Path, *more: object) -> list[str]:
    keys = {
        "SOLVER.MAX_ITER": 60,
        "SOLVER.STEPS": "(50,)",
        "SOLVER.CHECKPOINT_PERIOD": 5,
        "TEST.EVAL_PERIOD": 0,
        "OUTPUT_DIR": output,
    }
    words = [str(word) for pair in keys.items() for word in pair]
    return [*TINY, *SCRATCH, *words, *map(str, more)]


def iterations(output: Path) -> list[int]:
    lines = (output / "metrics.json").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that was stopped by Ctrl-C after a checkpoint, then resumed and finished."""
    output = tmp_path_factory.mktemp("run")
    words = [sys.executable, *TRAIN, *opts(output)]
    silence = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=ROOT, preexec_fn=enable_sigint, **silence)
    deadline = time.monotonic() + 120
    while not (output / "last_checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not (output / "model_final.pth").exists() and not (output / "run.json").exists()
    done = command(*TRAIN, "--resume", *opts(output))
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def test_interrupted_and_resumed(trained):
    log = (trained / "log.txt").read_text()
    start = [int(n) for n in re.findall(r"Starting training from iteration (\d+)", log)]
    saved = [int(n) + 1 for n in re.findall(r"Saving checkpoint to .*model_(\d+)", log)]
    assert start[0] == 0 and start[1] in saved
    assert iterations(trained)[-1] == 60, "the final evaluation"
    final = torch.load(trained / "model_final.pth", weights_only=True)
    assert final["iteration"] == 59


def test_outputs_of_a_run(trained):
    record = json.loads((trained / "run.json").read_text())
    assert record["seed"] == 0 and "CPU" in record["device"]
    assert record["versions"]["torch"] == torch.__version__
    state = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    assert sum(record["parameters"].values()) >= sum(t.numel() for t in state.values())
    lines = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    assert all(100 < line["peak_memory_mib"] < 24_000 for line in lines if "time" in line)
    assert {"bbox/AP", "segm/AP"} <= set(lines[-1])
    log = (trained / "log.txt").read_text()
    assert re.search(r"64 norm tensors, learning rate \S+, weight decay 0$", log, re.MULTILINE)
    assert re.search(r"other tensors, learning rate \S+, weight decay 0.0001$", log, re.MULTILINE)


def test_eval_only(trained, tmp_path):
    weights = trained / "model_final.pth"
    done = command(*TRAIN, "--eval-only", *opts(tmp_path, "MODEL.WEIGHTS", weights))
    assert done.returncode == 0, done.stderr[-2000:]
    found, expected = (
        json.loads((folder / "inference/coco_instances_results.json").read_text())
        for folder in (tmp_path, trained)
    )
    assert len(found) == len(expected)
    assert not (tmp_path / "metrics.json").exists()


def test_evaluating_on_another_file(trained, shapes, tmp_path):
    """The same data as a registered dataset's: the same detections, and a copy that is checked."""
    path = tmp_path / "other.json"
    content = json.loads((shapes / "instances_val.json").read_text())
    path.write_text(json.dumps(content))
    data = ["--val", path, shapes / "images"]
    output = tmp_path / "out"
    weights = trained / "model_final.pth"
    done = command(*TRAIN, "--eval-only", *data, *opts(output, "MODEL.WEIGHTS", weights))
    assert done.returncode == 0, done.stderr[-2000:]
    found, expected = (
        json.loads((folder / "inference/coco_instances_results.json").read_text())
        for folder in (output, trained)
    )
    assert [d["bbox"] for d in found] == [d["bbox"] for d in expected]
    content["annotations"][0]["bbox"] = [9999, 1, 5, 5]
    path.write_text(json.dumps(content))
    words = ["--eval-only", *data, *opts(output, "MODEL.WEIGHTS", weights)]
    with pytest.raises(SystemExit, match=r"val: .*outside"):
        run([*TRAIN[1:], *map(str, words)])


def test_test_time_augmentation(trained, tmp_path):
    """With the only size of the plain evaluation and no flip, it finds the same objects."""
    alike = ("TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", False, "TEST.AUG.ENABLED", True)
    words = opts(tmp_path, "MODEL.WEIGHTS", trained / "model_final.pth", *alike)
    results = Trainer.evaluate(read_config(TRAIN[2], words), resume=False)
    for task in ("bbox", "segm"):
        assert results[f"{task}_TTA"]["AP"] == pytest.approx(results[task]["AP"], abs=0.5)
    assert results["bbox"]["AP"] > 0


def test_test_time_augmentation_after_training(tmp_path):
    aug = ("TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.ENABLED", True)
    short = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()")
    trainer = Trainer(read_config(TRAIN[2], opts(tmp_path, *aug, *short)))
    trainer.resume_or_load(resume=False)
    trainer.train()
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert {"bbox/AP", "bbox_TTA/AP", "segm_TTA/AP"} <= set(last)
    assert (tmp_path / "run.json").exists()


INVALID = {
    "config": (["--config-file", "configs/none.yaml"], "configs/none.yaml"),
    "key": (["MODEL.GROUP_NORM.NUM_GROUP", "8"], "NUM_GROUP"),
    "groups": (
        ["MODEL.GROUP_NORM.NUM_GROUPS", "24"],
        "MODEL.GROUP_NORM.NUM_GROUPS 24: backbone",
    ),
    "weights": (["MODEL.WEIGHTS", "none.pth"], "MODEL.WEIGHTS none.pth"),
    "data": (["DATASETS.TRAIN", "('none',)"], r"dataset.* none\b"),
    "coco": (
        [
            *("DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "('coco_2017_val',)"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "80"),
        ],
        "instances_train2017.json",
    ),
    "output": (["OUTPUT_DIR", "/dev/null/run"], "OUTPUT_DIR /dev/null/run"),
}
INVALID["classes"] = (
    ["MODEL.ROI_HEADS.NUM_CLASSES", "80"],
    "MODEL.ROI_HEADS.NUM_CLASSES 80: .*shapes_val",
)
if not torch.cuda.is_available():
    INVALID["device"] = (["MODEL.DEVICE", "cuda"], "MODEL.DEVICE cpu")


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_reported_in_one_line(case, tmp_path):
    words, pattern = INVALID[case]
    flags = words if words[0].startswith("--") else []
    pairs = [] if flags else words
    done = command(*TRAIN, *flags, *opts(tmp_path / "run"), *pairs)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (message,) = re.findall(r"^error: .*", done.stderr, re.MULTILINE)
    assert re.search(pattern, message)
    assert not (tmp_path / "run" / "model_final.pth").exists()


def test_batch_norm_weights_for_a_gn_model(tmp_path):
    bn = build_model(shapes_config("mask_rcnn_R_18_FPN_frozenbn"))
    torch.save({"model": bn.state_dict()}, tmp_path / "bn.pth")
    done = command(*TRAIN, *opts(tmp_path / "run", "MODEL.WEIGHTS", tmp_path / "bn.pth"))
    assert done.returncode == 1
    assert re.search(r"MODEL.WEIGHTS .*bn.pth.*MODEL.RESNETS.NORM is .GN", done.stderr)


def test_each_warning_appears_once(shapes, tmp_path):
    """One of Detectron2 on reading the config, and one of gn_det on checking it."""
    state = build_model(shapes_config("mask_rcnn_R_18_FPN_gn")).backbone.bottom_up.state_dict()
    groups = {"MODEL.GROUP_NORM.NUM_GROUPS": 16, "MODEL.GROUP_NORM.DIM_PER_GP": -1}
    facts = {"MODEL.RESNETS.NORM": "GN", **groups}
    weights = tmp_path / "backbone.pth"
    torch.save({"model": state, "matching_heuristics": True, "gn_det": facts}, weights)
    values = yaml.safe_load(shapes_config("mask_rcnn_R_18_FPN_gn").dump())
    del values["VERSION"]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    words = opts(tmp_path / "run", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()")
    words += ["MODEL.WEIGHTS", str(weights)]
    data = [shapes / "instances_train.json", shapes / "images"]
    done = command("tools/train_net.py", "--config-file", config, "--train", *data, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout + done.stderr
    assert printed.count("has no VERSION") == 1
    assert printed.count("was trained with 16 groups") == 1
    assert "was trained with 16 groups" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize("tool", ["train_net", "pretrain_net", "demo", "make_shapes"])
def test_without_detectron2(tool, tmp_path):
    """Every tool reports in one line that Detectron2 is not installed."""
    blocker = "import sys\nsys.modules['detectron2'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = command(f"tools/{tool}.py", env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1
    assert re.fullmatch(r"error: gn_det needs Detectron2: .*install_detectron2.py\n", done.stderr)


def test_a_folder_belongs_to_one_run(tmp_path, monkeypatch):
    """A second training run in the same OUTPUT_DIR stops before it writes."""
    monkeypatch.setattr(files_module, "LOCK_TIMEOUT", 0.0)
    with locked(tmp_path), pytest.raises(SystemExit, match=r"OUTPUT_DIR"):
        run([*TRAIN[1:], *opts(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("SOLVER.BASE_LR", 0.5), ("SEED", 7), ("SOLVER.IMS_PER_BATCH", 4), ("MODEL.FPN.NORM", "LN")],
)
def test_resuming_with_other_settings(key, value, trained):
    """What a checkpoint has decided cannot change; nothing is written."""
    before = (trained / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match=f"{key} .*--resume|--resume.*{key} "):
        run([*TRAIN[1:], "--resume", *opts(trained, key, value)])
    assert (trained / "config.yaml").read_bytes() == before


def test_resuming_for_longer(trained, caplog):
    """MAX_ITER may grow, which is logged. A finished run says that there is nothing to do."""
    keys = ("SOLVER.MAX_ITER", 61)
    check_resumed_config(read_config(TRAIN[2], [*map(str, opts(trained, *keys))]))
    assert "SOLVER.MAX_ITER 60 became 61" in caplog.text
    trainer = Trainer(read_config(TRAIN[2], opts(trained)))
    trainer.resume_or_load(resume=True)
    assert "SOLVER.MAX_ITER" in caplog.text.splitlines()[-1]


def test_a_checkpoint_of_an_earlier_run_in_the_folder(trained, tmp_path):
    """A new run that was killed before its first checkpoint left its config.yaml."""
    shutil.copytree(trained, tmp_path / "run")
    other = opts(tmp_path / "run", "SOLVER.BASE_LR", 0.5)
    (tmp_path / "run/config.yaml").write_text(read_config(TRAIN[2], other).dump())
    with pytest.raises(SystemExit, match=r"model_final\.pth .*SOLVER\.BASE_LR"):
        run([*TRAIN[1:], "--resume", *other])


def test_resuming_with_changed_annotations(shapes, tmp_path):
    """A registered dataset whose file has changed is another dataset."""
    path = tmp_path / "own.json"
    content = json.loads((shapes / "instances_train.json").read_text())
    name = f"own_{tmp_path.name}"
    register_coco_instances(name, {}, str(path), str(shapes / "images"))
    keys = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    words = [*TRAIN[1:], *opts(tmp_path / "out", *keys, "DATASETS.TRAIN", f"('{name}',)")]
    path.write_text(json.dumps(content))
    run(words)
    run([*words[:2], "--resume", *words[2:]])
    del content["annotations"][0]
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"dataset {name} "):
        run([*words[:2], "--resume", *words[2:]])


def test_ground_truth_of_an_earlier_run(tmp_path):
    """Detectron2 would evaluate a dataset without a JSON file against the old one."""
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", "OUTPUT_DIR", tmp_path)
    stale = tmp_path / "inference" / "shapes_val_coco_format.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    Trainer.check_inputs(cfg, eval_only=True)
    assert not stale.exists()


def test_output_dir_is_a_path():
    with pytest.raises(InputError, match="OUTPUT_DIR"):
        shapes_config("mask_rcnn_R_18_FPN_gn", "OUTPUT_DIR", "None")


@pytest.fixture
def swapped(shapes, tmp_path) -> Iterator[str]:
    """A registered dataset in which two categories have exchanged their ids."""
    content = json.loads((shapes / "instances_val.json").read_text())
    first, second, *_ = content["categories"]
    first["id"], second["id"] = second["id"], first["id"]
    path = tmp_path / "swapped.json"
    path.write_text(json.dumps(content))
    name = f"swapped_{tmp_path.name}"
    register_coco_instances(name, {}, str(path), str(shapes / "images"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_evaluating_on_swapped_categories(trained, swapped):
    """The model's own categories stand in its run.json."""
    weights = ("MODEL.WEIGHTS", trained / "model_final.pth")
    words = [
        *TRAIN[1:],
        "--eval-only",
        *opts(trained, *weights),
        "DATASETS.TEST",
        f"('{swapped}',)",
    ]
    with pytest.raises(SystemExit, match=rf"class 0 .*run\.json.*{swapped}"):
        run(words)


def test_training_and_validation_with_swapped_categories(tmp_path, swapped):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", "DATASETS.TEST", f"('{swapped}',)")
    with pytest.raises(InputError, match=f"class 0 .*shapes_train.*{swapped}"):
        Trainer.check_inputs(cfg, eval_only=False)
