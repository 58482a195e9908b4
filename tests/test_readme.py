"""README's commands and Python lines, run as they stand there, on small data."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, SCRATCH, TINY, command, shapes_config
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model

from gn_det.data import make_shapes

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("   #")[0]
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("#")
]
SHORT = [
    *TINY[2 * 2 :],
    *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "TEST.EVAL_PERIOD", "0"),
]
SHORT_PRETRAINING = [
    *("PRETRAIN.EPOCHS", "1", "PRETRAIN.STEPS", "()", "PRETRAIN.IMAGE_SIZE", "32"),
    *("SOLVER.IMS_PER_BATCH", "4"),
]


def commands(start: str) -> list[str]:
    found = [c for c in COMMANDS if c.startswith(start)]
    assert found, start
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, shapes) -> Path:
    """A folder as a user has it: the repository's tools and configs, and COCO and ImageNet below
    datasets/.

    COCO is played by `shapes`, whose categories go by the names and ids of COCO's first ones, and
    ImageNet by its crops.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "datasets/coco/annotations").mkdir(parents=True)
    things = [c for c in COCO_CATEGORIES if c["isthing"]]
    for split in ("train", "val"):
        (folder / f"datasets/coco/{split}2017").symlink_to(shapes / "images")
        content = json.loads((shapes / f"instances_{split}.json").read_text())
        content["categories"] = [{"id": c["id"], "name": c["name"]} for c in things]
        path = folder / f"datasets/coco/annotations/instances_{split}2017.json"
        path.write_text(json.dumps(content))
    (folder / "datasets/imagenet").symlink_to(shapes / "crops")
    return folder


def run(command: str, folder: Path, *more: str) -> str:
    words = shlex.split(command)
    assert words[0] == "python"
    environment = {k: v for k, v in os.environ.items() if k != "DETECTRON2_DATASETS"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *words[1:], *more],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout


def test_every_command_is_run_by_a_test():
    """A new command in README has to be added below."""
    known = ("make demo", "make test", "pip install .", "python tools/", "torchrun ")
    assert all(c.startswith(known) for c in COMMANDS)
    tools = {shlex.split(c)[1] for c in COMMANDS if c.startswith("python")}
    assert tools == {f"tools/{p.name}" for p in (ROOT / "tools").glob("*.py")}


@pytest.mark.parametrize("target", ["demo", "test", "faults"])
def test_make(target):
    """What `make` starts once all is set up; tests/engine/test_demo.py runs the demo itself."""
    assert f"make {target}" in README
    # Without what an outer `make test` tells its children
    environment = {k: v for k, v in os.environ.items() if "MAKE" not in k and k != "MFLAGS"}
    done = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.ready", target],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    last = {
        "demo": ".venv/bin/python tools/demo.py",
        "test": ".venv/bin/python -m pytest ",
        "faults": ".venv/bin/python tests/faults/campaign.py 200",
    }
    assert last[target] in done.stdout.strip().splitlines()[-1]


def test_install_detectron2(checkout):
    (command,) = commands("python tools/install_detectron2.py")
    assert "nothing to do" in run(command, checkout)


def test_train_resume_evaluate(checkout):
    """In README's order, in one folder, on what stands in for COCO."""
    start = "python tools/train_net.py --config-file configs/COCO-InstanceSegmentation"
    coco = [c for c in commands(start) if "ACCUMULATE" not in c]
    assert [
        bool(re.search(flag, c)) for flag, c in zip(("1$", "--resume", "--eval"), coco, strict=True)
    ]
    weights = SCRATCH
    device = ("MODEL.DEVICE", "cpu")
    train, resume, evaluate = coco
    run(train, checkout, *device, *weights, *SHORT)
    assert (checkout / "output/model_final.pth").exists()
    longer = [*SHORT, "SOLVER.MAX_ITER", "4"]
    run(resume, checkout, *device, *weights, *longer)
    assert "Starting training from iteration 2" in (checkout / "output/log.txt").read_text()
    assert "bbox" in run(evaluate, checkout, *device, *SHORT)


def test_torchrun(checkout):
    """tests/engine/test_processes.py has a whole training."""
    (words,) = commands("torchrun ")
    words = words.replace(
        "torchrun --nproc-per-node 8", "python -m torch.distributed.run --nproc-per-node 2"
    )
    printed = run(words, checkout, "--check", "MODEL.DEVICE", "cpu")
    assert printed.count("per pass on 2 GPUs") == 1, "told by one of them"


def test_own_data(checkout, shapes):
    """The plans of both tools; tests/engine/test_compare.py has a whole comparison."""
    (checkout / "mine").mkdir()
    (checkout / "mine/images").symlink_to(shapes / "images")
    for split in ("train", "val"):
        (checkout / f"mine/{split}.json").symlink_to(shapes / f"instances_{split}.json")
    plan, compare = commands("python tools/compare.py")
    for words in (plan, f"{compare} --check"):
        printed = run(words, checkout)
        assert (
            "train: 1 pictures without objects" in printed and "adapted to the dataset" in printed
        )
    assert "GN, batch size 1, seed 0" in printed
    (train,) = commands("python tools/train_net.py --train")
    assert "output/data/train.json: " in run(train.replace("--train", "--check --train"), checkout)


def test_replicate(checkout):
    """tests/tools/test_replicate.py has its trainings; they would take an hour."""
    (command,) = commands("python tools/replicate.py")
    assert "--profile {cpu,gpu}" in run(command, checkout, "--help")


def test_predict(checkout):
    """A model as a comparison leaves it."""
    best = checkout / "output/compare/best"
    best.mkdir(parents=True, exist_ok=True)
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH)
    (best / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, best / "model_final.pth")
    (best / "run.json").write_text("{}")
    (command,) = commands("python tools/predict.py")
    assert "coco_instances_results.json: " in run(command, checkout)


def test_the_demo_step_by_step(checkout):
    (make,) = commands("python tools/make_shapes.py")
    small = re.sub(r"--num-train \d+ --num-val \d+", "--num-train 6 --num-val 2", make)
    run(small, checkout)
    (pretrain,) = commands("python tools/pretrain_net.py --config-file configs/Shapes")
    run(pretrain, checkout, *SHORT, *SHORT_PRETRAINING)
    (train,) = commands("python tools/train_net.py --config-file configs/Shapes")
    run(train, checkout, *SHORT)
    assert (checkout / "output/gn/model_final.pth").exists()


def test_backbones(checkout):
    """BN* and GN from one file, and the study that compares ways from one to the other."""
    torch.manual_seed(0)
    # A smaller one, under README's name
    torch.save(torchvision.models.resnet18().state_dict(), checkout / "resnet50.pth")
    as_bn, as_gn = commands("python tools/convert_backbone.py")
    assert re.search(r"taken +100 ", run(as_bn, checkout))
    run(as_gn, checkout, "--num-pictures", "4", "--distill", "1")
    assert "NORM: GN" in (checkout / "R-50-GN.yaml").read_text()
    assert "DIM_PER_GP: 16" in (checkout / "R-50-GN.yaml").read_text()
    (keys,) = re.findall(r"`(MODEL\S+ 16 .* SOLVER.BACKBONE_MULTIPLIER 0.1)`", README)
    start = "python tools/train_net.py --check --config-file configs/COCO-InstanceSegmentation"
    printed = run(f"{start}/mask_rcnn_R_50_FPN_2x_gn.yaml {keys}", checkout)
    for told in ("ResNet: 53 GN (16 channels per group)", "FPN: 8 GN (32 groups)", "rate 0.00025,"):
        assert told in printed
    (study,) = commands("python tools/study_calibration.py")
    make_shapes(checkout / "datasets/mine", num_train=6, num_val=2)
    few = ("--seeds", "0", "--models", "BN*", "GN calibrated", "--opts", *SHORT)
    printed = run(study, checkout, *few)
    assert re.search(r"\| GN calibrated \| \S+ ± 0\.0 \(1 seed\) \|", printed)
    assert (checkout / "output/study_calibration/plot.png").exists()


def test_pretraining(checkout):
    """In README's order; then a detector takes the backbone, as the text says."""
    train, evaluate = commands("python tools/pretrain_net.py --config-file configs/ImageNet")
    cpu = ("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", *SHORT_PRETRAINING)
    run(train.replace("--num-gpus 8", ""), checkout, *cpu)
    assert "top1" in run(evaluate, checkout, *cpu)
    (weights,) = re.findall(r"`(MODEL.WEIGHTS \S+/backbone.pth)`", README)
    start = "python tools/train_net.py --check --config-file configs/COCO-InstanceSegmentation"
    printed = run(f"{start}/mask_rcnn_R_50_FPN_2x_gn.yaml {weights}", checkout)
    assert re.search(r"filled: 159 of 223 tensors \(ResNet 159\)", printed)


def test_study(checkout):
    """Of a study that was interrupted only the rest is trained, and all of it is told."""
    (command,) = commands("python tools/study_norms.py")
    spec = importlib.util.spec_from_file_location("study_norms", ROOT / "tools/study_norms.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    folder = checkout / "output/study"
    make_shapes(folder / "shapes", num_train=12, num_val=2)
    opts = ["PRETRAIN.EPOCHS", "1", "PRETRAIN.STEPS", "()", "PRETRAIN.IMAGE_SIZE", "33"]
    settings = {"config": study.CONFIG, "opts": opts, "pictures": list(study.PICTURES)}
    left = [study.GN, study.Model("BN", batch=2)]
    done = [m for m in study.MODELS if m not in left]
    assert len(done) == 21
    runs = [{"model": m._asdict(), "seed": 0, "error": 12.5} for m in done]
    (folder / "results.json").write_text(json.dumps({"settings": settings, "runs": runs}))
    run(f"{command} --seeds 1", checkout, *opts)
    results = json.loads((folder / "results.json").read_text())
    assert results["runs"][:21] == runs and len(results["runs"]) == 23
    new = {(r["model"]["norm"], r["model"]["batch"]): r for r in results["runs"][21:]}
    crops = len(list((folder / "shapes/crops/train").glob("*/*.png")))
    for (_, batch), one in new.items():
        assert one["iterations"] == round(crops / batch) and 0 <= one["error"] <= 100
        assert one["learning_rate"] == pytest.approx(0.01 * batch / 32)
    text = (folder / "results.md").read_text()
    gn, bn = (f"{new[key]['error']:.1f} (" for key in (("GN", 32), ("BN", 2)))
    table = re.findall(r"^\| (\S.*?) \| (.*) \|$", text, re.MULTILINE)
    rows = {name: cells.split(" | ") for name, cells in table}
    assert rows["error"][3].startswith(gn) and rows["GN"][0].startswith(gn)
    assert rows["groups"][1].startswith(gn) and rows["BN"][4].startswith(bn)
    assert rows["error"][0] == "12.5 (12.5–12.5)" and len(rows["channels per group"]) == 7
    assert (folder / "results.png").stat().st_size > 10_000


def test_benchmark():
    """Run by tests/tools/test_benchmark.py, at small sizes."""
    assert commands("python tools/benchmark.py") == ["python tools/benchmark.py"]


def test_group_divisions(checkout):
    """Through `--check`, for all of Table 3; one of them trains."""
    by_count, by_width = commands("python tools/train_net.py --num-gpus 8 --config-file")
    for line, kind in ((by_count, "GN (16 groups)"), (by_width, "GN (16 channels per group)")):
        assert f"ResNet: 53 {kind}" in run(line.replace("--num", "--check --num"), checkout)
    by_width = by_width.replace("--num-gpus 8", "")
    run(by_width, checkout, "MODEL.DEVICE", "cpu", *SHORT, "OUTPUT_DIR", "output/groups")


def test_a_small_gpu(checkout):
    (command,) = [c for c in commands("python tools/train_net.py") if "ACCUMULATE" in c]
    printed = run(command.replace("SOLVER.REF", "--check SOLVER.REF"), checkout)
    assert "16 images per step: 1 per pass on 1 GPU, 16 passes" in printed
    assert "step 120,000: 0.002" in printed
    short = (*SHORT, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_ITERS", "4")
    run(command, checkout, "MODEL.DEVICE", "cpu", *SCRATCH, *short, "OUTPUT_DIR", "output/small")


def test_check(checkout):
    (command,) = commands("python tools/train_net.py --num-gpus 8 --check")
    assert "53 GN (32 groups)" in run(command, checkout)


def test_the_error_that_is_shown():
    """README's error is the one that its mistakes give."""
    (shown,) = re.findall(r"```\n(error: .*?)\n```", README, re.DOTALL)
    config = "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn.yaml"
    mistakes = ("MODEL.RESNETS.STRIDE_IN_1X1", True, "MODEL.ROI_BOX_HEAD.NUM_CONV", 0)
    done = command("tools/train_net.py", "--check", "--config-file", config, *mistakes)
    lines = done.stderr.strip().splitlines()
    assert sorted(lines) == sorted(shown.splitlines())


def test_recipes_table():
    """Each row's command trains the config that the row links to."""
    rows = re.findall(r"\]\((configs/\S+?\.yaml)\) .*`(python tools/train_net.py .*)`", README)
    assert len(rows) == 22
    for path, line in rows:
        assert shlex.split(line)[-2:] == ["--config-file", path] and (ROOT / path).is_file()


def test_a_longer_demo(checkout):
    (demo,) = commands("python tools/demo.py")
    make_shapes(checkout / "output/longer/datasets/shapes", num_train=6, num_val=2)
    assert "report.html" in run(demo, checkout, *SHORT)


def test_python_lines(checkout):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    head, build, rest = code.partition("trainer = ")
    opts = ["MODEL.DEVICE", "cpu", *SCRATCH, *SHORT, "OUTPUT_DIR", "output/python"]
    opts += ["SOLVER.REFERENCE_WORLD_SIZE", "0"]
    script = f"{head}cfg.merge_from_list({opts!r})\n{build}{rest}"
    (checkout / "lines.py").write_text(script)
    assert "Optimizer group: " in run("python lines.py", checkout)
    assert (checkout / "output/python/model_final.pth").exists()


def test_tables_are_tables():
    """Without a second line of dashes, as wide as the first, Markdown shows one paragraph."""
    lines = re.sub(r"```.*?```", "", README, flags=re.DOTALL).splitlines()
    rows = [None, *(line.replace(r"\|", "").count("|") for line in lines)]
    heads = [i for i in range(1, len(lines)) if rows[i + 1] and not rows[i]]
    assert len(heads) > 8
    for i in heads:
        assert re.fullmatch(r"(\|-+)+\|", lines[i + 1]), lines[i]
        assert rows[i + 2] == rows[i + 1], lines[i]


def test_files_that_are_named_exist():
    names = re.findall(r"\]\((?!http)([^)]+)\)", README)
    names += re.findall(r"^((?:gn_det|tools|configs)/\S*)  ", README, re.MULTILINE)
    assert len(names) > 20
    assert all((ROOT / name).exists() for name in names)
    listed = set(re.findall(r"^(gn_det/\S+\.py) ", README, re.MULTILINE))
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "gn_det").rglob("*.py")}
    assert listed == {f for f in files if not f.endswith("__init__.py")}
