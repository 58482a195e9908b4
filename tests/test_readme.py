"""Every README.md: its commands are run as they stand there, on small data, and its claims hold."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import measured
import pytest
import torch
import torchvision
from conftest import ROOT, SCRATCH, TINY, command, shapes_config
from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from readmes import Page, Runner, find_pages

import gn_det
from gn_det.comparison.demo import MODELS, PRETRAININGS, Demo
from gn_det.comparison.jobs import Training
from gn_det.config import flatten
from gn_det.data import make_shapes
from gn_det.data.moving_shapes import make_moving_shapes
from gn_det.engine import train

PAGES = find_pages()
BY_NAME = {page.name: page for page in PAGES}
README, CONFIGS, TOOLS = (BY_NAME[f"{name}README.md"] for name in ("", "configs/", "tools/"))
CONTRIBUTING = Page(".github/CONTRIBUTING.md")
COMMANDS = [command for page in PAGES for command in page.commands]

SHORT = [
    *TINY[2 * 2 :],
    *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "TEST.EVAL_PERIOD", "0"),
]
SHORT_PRETRAINING = [
    *("PRETRAIN.EPOCHS", "1", "PRETRAIN.STEPS", "()", "PRETRAIN.IMAGE_SIZE", "32"),
    *("SOLVER.IMS_PER_BATCH", "4"),
]
CPU = ("MODEL.DEVICE", "cpu")
CHECK = "python tools/train_net.py --check --config-file"
COCO = "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn.yaml"


def commands(page: Page, start: str) -> list[str]:
    found = [command for command in page.commands if command.startswith(start)]
    assert found, start
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, shapes) -> Path:
    """A folder as a user has it: tools and configs, COCO, ImageNet, and data of one's own.

    COCO is played by `shapes`, whose categories go by the names and ids of COCO's first ones, and
    ImageNet by its crops.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "datasets/coco/annotations").mkdir(parents=True)
    (folder / "mine").mkdir()
    (folder / "mine/images").symlink_to(shapes / "images")
    things = [c for c in COCO_CATEGORIES if c["isthing"]]
    for split in ("train", "val"):
        (folder / f"datasets/coco/{split}2017").symlink_to(shapes / "images")
        (folder / f"mine/{split}.json").symlink_to(shapes / f"instances_{split}.json")
        content = json.loads((shapes / f"instances_{split}.json").read_text())
        content["categories"] = [{"id": c["id"], "name": c["name"]} for c in things]
        path = folder / f"datasets/coco/annotations/instances_{split}2017.json"
        path.write_text(json.dumps(content))
    (folder / "datasets/imagenet").symlink_to(shapes / "crops")
    make_shapes(folder / "datasets/mine", num_train=6, num_val=2)
    return folder


@pytest.fixture(scope="module")
def runner(checkout) -> Runner:
    return Runner(checkout)


@pytest.fixture(scope="module")
def backbones(checkout) -> None:
    """A smaller one than its name says, from torchvision."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), checkout / "resnet50.pth")


def save_model(folder: Path) -> None:
    """A detector that has learnt nothing, as a finished training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH)
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = f"{folder}/model_final.pth", str(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(3)
    model = build_model(cfg)
    # Scores that differ clearly, in any order of the operations
    model.roi_heads.box_predictor.cls_score.weight.data.normal_(0, 0.3)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "run.json").write_text("{}")


def finish(training: Training) -> None:
    """Leave what a finished training leaves, of one that has found nothing."""
    (training.folder / "inference").mkdir(parents=True)
    (training.folder / "inference/coco_instances_results.json").write_text("[]")
    measured = {"iteration": 1, "peak_memory_mib": 1.0, "accuracy/top1": 50.0}
    (training.folder / "metrics.json").write_text(json.dumps(measured) + "\n")
    parameters = {"trainable": 1, "frozen": 0}
    record = {"seed": 0, "device": "abacus", "versions": {"torch": "2"}, "git_commit": None}
    (training.folder / training.product).write_text(
        json.dumps({**record, "parameters": parameters})
    )


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    tool = importlib.util.module_from_spec(spec)
    sys.modules[name] = tool
    spec.loader.exec_module(tool)
    return tool


# README.md


@pytest.mark.parametrize("target", ["demo", "test", "faults"])
def test_make(target, runner):
    """What `make` starts once all is set up; tests/comparison/test_demo.py runs the demo itself."""
    if target != "faults":
        runner.done.update(commands(README, f"make {target}"))
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


def test_install(runner, tmp_path):
    """From a copy, so that building leaves nothing in the checkout; no package is fetched."""
    (words,) = commands(README, "pip install")
    for name in ("gn_det", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path)], check=True)
    offline = ("--no-deps", "--no-build-isolation", "--quiet", "--target", str(tmp_path / "site"))
    pip = [sys.executable, "-m", *words.split(), *offline]
    subprocess.run(pip, cwd=tmp_path, check=True, capture_output=True)
    code = "import gn_det; print(gn_det.__file__)"
    done = command("-c", code, cwd=tmp_path / "site", env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.stdout.strip() == str(tmp_path / "site/gn_det/__init__.py"), done.stderr
    runner.done.add(words)


def test_compare(runner):
    """The plans; tests/comparison/test_compare.py has a whole comparison."""
    plan, compare = commands(README, "python tools/compare.py")
    for words, more in ((plan, ()), (compare, ("--check",))):
        printed = runner.run(words, *more)
        for norm in ("FrozenBN", "FrozenBN/GN", "GN"):
            assert f"\n{norm}, batch size 2, seed 0\n" in printed
        assert re.search(r"train: 1 \w+ without objects \(\w+\.png\)", printed)


def test_predict(checkout, runner):
    save_model(checkout / "output/compare/best")
    (words,) = commands(README, "python tools/predict.py")
    assert "output/predictions/coco_instances_results.json: " in runner.run(words)
    assert len(list((checkout / "output/predictions").glob("*.jpg"))) == 18


def test_train_resume_evaluate(checkout, runner):
    """In README's order, in one folder, on what stands in for COCO."""
    train, resume, evaluate = commands(README, "python tools/train_net.py")
    runner.run(train, *CPU, *SCRATCH, *SHORT)
    assert (checkout / "output/model_final.pth").exists()
    runner.run(resume, *CPU, *SCRATCH, *SHORT, "SOLVER.MAX_ITER", "4")
    assert "Starting training from iteration 2" in (checkout / "output/log.txt").read_text()
    assert "bbox" in runner.run(evaluate, *CPU, *SHORT)


def test_backbones(checkout, runner, backbones):
    """BN* and GN from one file, and a training with the keys that README recommends."""
    as_bn, as_gn = commands(README, "python tools/convert_backbone.py")
    assert re.search(r"taken +100 ", runner.run(as_bn))
    runner.run(as_gn, "--num-images", "4", change=[("--distill 300", "--distill 1")])
    made = (checkout / "R-50-GN.yaml").read_text()
    assert "NORM: GN" in made and "DIM_PER_GP: 16" in made
    (keys,) = re.findall(r"`(MODEL\S+ 16 .* SOLVER.BACKBONE_MULTIPLIER 0.1)`", README.text)
    printed = runner.run(f"{CHECK} {COCO} {keys}")
    for line in (
        "ResNet: 53 GN (16 channels per group)",
        "FPN: 8 GN (2 channels per group)",
        "rate 0.00025,",
    ):
        assert line in printed


def test_python(checkout, runner):
    """README's six lines give a config that passes the checks; the engine's page trains by one."""
    (few,) = README.blocks("python")
    assert sum(map(bool, few.splitlines())) == 6
    (check,) = re.findall(r"`(gn_det\.check_config\(.*?\))`", README.text)
    (checkout / "few.py").write_text(f"{few}{check}\nprint(cfg.MODEL.RESNETS.NORM)\n")
    assert runner.run("python few.py") == "GN\n"
    (code,) = BY_NAME["gn_det/engine/README.md"].blocks("python")
    head, build, rest = code.partition("trainer = ")
    opts = [*CPU, *SCRATCH, *SHORT, "OUTPUT_DIR", "output/python"]
    opts += ["SOLVER.REFERENCE_WORLD_SIZE", "0"]
    (checkout / "lines.py").write_text(f"{head}cfg.merge_from_list({opts!r})\n{build}{rest}")
    assert "Optimizer group: " in runner.run("python lines.py")
    assert (checkout / "output/python/model_final.pth").exists()


# configs/README.md


def test_recipes(runner):
    """The command above the table, and a config for each row, in the folder that it names."""
    (words,) = commands(CONFIGS, "python tools/train_net.py --num-gpus 8 --config-file configs/D")[
        :1
    ]
    printed = runner.run(words, change=[("--num-gpus", "--check --num-gpus")])
    assert "53 GN (32 groups)" in printed and "16 images per step: 2 per pass on 8 GPUs" in printed
    folder = Path(words.split()[-1]).parent
    assert folder.name == "Detectron1-Comparisons"
    recipes, zoo, vgg, clips = (t for t in CONFIGS.tables if "config" in t.head)
    paths = [folder / f"{n.strip('`')}.yaml" for n in recipes.column(1)]
    paths += [Path(COCO).with_name(f"{name.strip('`')}.yaml") for name in zoo.column(0)]
    paths += [Path("configs") / f"{name.strip('`')}.yaml" for name in vgg.column(0)]
    kinetics = Path("configs/Kinetics-Classification")
    paths += [kinetics / f"{row.split('`')[1]}.yaml" for row in clips.column(0)]
    assert len(paths) == 22 + 8 + 3 + 6 and all((ROOT / path).is_file() for path in paths)


def test_groupings(runner):
    by_count, by_width = commands(CONFIGS, "python tools/train_net.py --num-gpus 8")[1:]
    for words, kind in ((by_count, "GN (16 groups)"), (by_width, "GN (16 channels per group)")):
        printed = runner.run(words, change=[("--num-gpus", "--check --num-gpus")])
        assert f"ResNet: 53 {kind}" in printed


def test_a_small_gpu(runner):
    """Its recipe, and a training with 4 passes."""
    (words,) = [c for c in CONFIGS.commands if "ACCUMULATE" in c]
    printed = runner.run(words, change=[("SOLVER.REF", "--check SOLVER.REF")])
    assert "16 images per step: 1 per pass on 1 GPU, 16 passes" in printed
    assert "step 120,000: 0.002" in printed
    short = (*SHORT, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_ITERS", "4")
    runner.run(words, *CPU, *SCRATCH, *short, "OUTPUT_DIR", "output/small")


def test_pretraining(runner):
    """In the page's order; then a detector takes the backbone, as the text says."""
    train, evaluate, *_ = commands(CONFIGS, "python tools/pretrain_net.py")
    cpu = (*CPU, "DATALOADER.NUM_WORKERS", "0", *SHORT_PRETRAINING)
    runner.run(train, *cpu, change=[("--num-gpus 8", "")])
    assert "top1" in runner.run(evaluate, *cpu)
    (weights,) = re.findall(r"`(MODEL.WEIGHTS \S+/backbone.pth)`", CONFIGS.text)
    printed = runner.run(f"{CHECK} {COCO} {weights}")
    assert re.search(r"loaded: 159 of 223 tensors \(ResNet 159\)", printed)


def test_vgg(checkout, runner):
    """A VGG-11 in place of the VGG-16, without its hidden layers."""
    torch.manual_seed(0)
    features = torchvision.models.vgg11_bn().features.state_dict()
    path = checkout / "vgg16_bn.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.items()}, path)
    bn, gn = commands(CONFIGS, "python tools/convert_backbone.py vgg16_bn.pth")
    assert "taken      40 tensors, source vgg" in runner.run(bn)
    printed = runner.run(gn, "--num-images", "2", change=[("--distill 300", "--distill 1")])
    assert "VGG: {NORM: GN, DEPTH: 11, WIDTH: 64}" in printed
    assert (checkout / "VGG-16-GN.pth").is_file() and (checkout / "VGG-16-BN.yaml").is_file()


def test_clips(checkout, runner, backbones):
    """A small network, on moving shapes, with weights at random."""
    (convert,) = commands(CONFIGS, "python tools/convert_backbone.py R-50-GN.pkl")
    runner.run(convert, change=[("R-50-GN.pkl", "resnet50.pth")])
    make_moving_shapes(checkout / "datasets/kinetics", 8, 4)
    *_, train, evaluate = commands(CONFIGS, "python tools/pretrain_net.py")
    small = (*CPU, *SHORT_PRETRAINING, "DATALOADER.NUM_WORKERS", "0", "MODEL.RESNETS.DEPTH", "18")
    small = (*small, "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "PRETRAIN.FRAMES", "8")
    runner.run(train, *small, "MODEL.WEIGHTS", "", change=[("--num-gpus 8", "")])
    assert "top1" in runner.run(evaluate, *small, change=[("--num-gpus 8", "")])


def test_keys():
    """All that gn_det adds, with their defaults, and six of them in README."""
    cfg, plain = get_cfg(), flatten(get_cfg())
    gn_det.add_gn_config(cfg)
    added = {key: str(value) for key, value in flatten(cfg).items() if key not in plain}
    (table,) = (t for t in CONFIGS.tables if t.head == ("key", "default", "meaning"))
    assert {key.strip("`"): default for key, default, _ in table.rows} == added
    (six,) = (t for t in README.tables if t.head[0] == "key")
    assert len(six.rows) == 6 and {key.strip("`") for key in six.column(0)} <= set(added)


# tools/README.md


def test_flags(monkeypatch, capsys):
    """The page has every flag of every command, but for Detectron2's own, and no other."""
    detectron2 = set(default_argument_parser()._option_string_actions)
    known: set[str] = set()
    for path in sorted((ROOT / "tools").glob("*.py")):
        assert f"[{path.name}](#" in TOOLS.text
        if path.name != "install_detectron2.py":
            monkeypatch.setattr("sys.argv", [str(path), "--help"])
            with pytest.raises(SystemExit):
                exec(
                    compile(path.read_text(), path, "exec"),
                    {"__name__": "__main__", "__file__": str(path)},
                )
            known |= set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    flags = [t for t in TOOLS.tables if t.head[0] == "flag"]
    documented = {flag for t in flags for row in t.rows for flag in re.findall(r"--[\w-]+", row[0])}
    assert documented - detectron2 == known - detectron2 and len(known) > 30


def test_compare_in_full(runner, backbones):
    (words,) = commands(TOOLS, "python tools/compare.py")
    bn = "python tools/convert_backbone.py resnet50.pth R-50.pth"
    assert bn in README.commands
    runner.run(bn)
    printed = runner.run(
        words,
        *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
        # Of a file of `shapes`, that is, every image is a group
        change=[(r"'case(\d+)'", r"'(\d+)'"), ("--val-fraction 0.3", "--val-fraction 0.5")],
    )
    frozen, gn = printed.split("\nFrozenBN/GN, batch size 2, seed 0\n")[1].split(
        "\nGN, batch size 2"
    )
    assert "ResNet: 20 FrozenBN" in frozen and "ResNet: 20 GN (16 channels per group)" in gn
    assert "FPN: 8 GN (2 channels per group)" in frozen and "24.0 epochs" in frozen
    assert "loaded: 100 of 164 tensors (ResNet 100)" in frozen


def test_predict_in_full(checkout, runner):
    save_model(checkout / "output/gn")
    (words,) = commands(TOOLS, "python tools/predict.py")
    assert "output/found/coco_instances_results.json: " in runner.run(words)


def test_export(checkout, runner):
    """Export and run; tests/engine/test_export.py compares the detections."""
    save_model(checkout / "output/gn")
    (words,) = commands(TOOLS, "python tools/export_model.py")
    assert "output/gn/model.onnx: " in runner.run(words)
    (checkout / "image.jpg").write_bytes((checkout / "mine/images/val_000000.png").read_bytes())
    (words,) = commands(TOOLS, "python tools/run_onnx.py")
    runner.run(words)
    assert (checkout / "image.jpg.found.png").is_file()


def test_own_data(checkout, runner):
    """Through `--check`, which looks at the data and writes it."""
    (words,) = commands(TOOLS, "python tools/train_net.py --train")
    printed = runner.run(words, change=[("--train", "--check --train")])
    assert "output/data/train.json: " in printed and "step 3,500: 0.00025" in printed


def test_other_annotations(checkout, runner):
    save_model(checkout / "output/compare/best")
    (words,) = commands(TOOLS, "python tools/train_net.py --eval-only")
    runner.run(words)
    written = checkout / "output/compare/best/inference/coco_instances_results.json"
    assert isinstance(json.loads(written.read_text()), list)


def test_check(runner):
    (words,) = commands(TOOLS, "python tools/train_net.py --num-gpus 8 --check")
    assert "53 GN (32 groups)" in runner.run(words)


def test_the_error_that_is_shown():
    """The page's error is the one that its mistakes give."""
    (shown,) = re.findall(r"```\n(error: .*?)\n```", TOOLS.text, re.DOTALL)
    mistakes = ("MODEL.RESNETS.STRIDE_IN_1X1", True, "MODEL.ROI_BOX_HEAD.NUM_CONV", 0)
    words = ["--check", "--config-file", str(ROOT / COCO), *map(str, mistakes)]
    with pytest.raises(SystemExit) as error:
        train.run(words)
    assert sorted(str(error.value).splitlines()) == sorted(shown.splitlines())


def test_the_demo_step_by_step(checkout, runner):
    """The data set is made anew, in place of the one that the demo's configs would look for."""
    (make,) = commands(TOOLS, "python tools/make_shapes.py")
    few = ("--num-train 600 --num-val 100", "--num-train 6 --num-val 2")
    runner.run(make, change=[few])
    (pretrain,) = commands(TOOLS, "python tools/pretrain_net.py")
    runner.run(pretrain, *SHORT, *SHORT_PRETRAINING)
    (train,) = commands(TOOLS, "python tools/train_net.py --config-file configs/Shapes")
    runner.run(train, *SHORT)
    assert (checkout / "output/gn/model_final.pth").exists()


def test_convert_in_full(checkout, runner, backbones):
    """Two files with other pixels than torchvision's: rewritten, and as `KEY VALUE` pairs say."""
    (folded,) = commands(TOOLS, "python tools/convert_backbone.py")
    (given,) = commands(BY_NAME["gn_det/checkpoint/README.md"], "python tools/convert_backbone.py")
    for words in (folded, given):
        runner.run(words)
        made = (checkout / words.split()[3]).with_suffix(".yaml").read_text()
        assert "FORMAT: BGR" in made and "PIXEL_STD: [1.0, 1.0, 1.0]" in made


def test_a_longer_demo(checkout, runner):
    """All but the last training is done; tests/comparison/test_demo.py has a whole demo."""
    (words,) = commands(TOOLS, "python tools/demo.py")
    output = checkout / "output/longer"
    make_shapes(output / "datasets/shapes", num_train=6, num_val=2)
    demo = Demo(output, [*SHORT, *SCRATCH])
    for name in PRETRAININGS:
        finish(demo.training(name, "pretrain", "backbone.pth"))
    *others, last = (demo.training(config, "train", "run.json") for *_, config, _ in MODELS)
    for training in others:
        finish(training)
    assert "report.html" in runner.run(words, *SHORT, *SCRATCH)
    assert (last.folder / "model_final.pth").exists()
    found = json.loads((output / "results.json").read_text())
    assert [model["model"] for model in found["models"]] == ["BN*", "GN", "BN"]


def test_benchmark(checkout, runner):
    """One round at a small size, of two detectors."""
    (words,) = commands(TOOLS, "python tools/benchmark.py")
    small = ("--size", "64", "64", "--only", "gn_det GN, norm")
    runner.run(words, *small, change=[("--rounds 20", "--rounds 1")])
    rows = json.loads((checkout / "output/benchmark/results.json").read_text())["R50-FPN"]
    ratios = {row["rival"]: row["memory ratio"] for row in rows if row["way"] == "train"}
    assert ratios.keys() == {"Detectron2 BN*", "gn_det GN, norm"}
    assert 1 == ratios["Detectron2 BN*"] < ratios["gn_det GN, norm"] < 1.6


def test_study_calibration(checkout, runner, backbones):
    (words,) = commands(TOOLS, "python tools/study_calibration.py")
    few = ("--seeds", "0", "--models", "BN*", "GN calibrated", "--opts", *SHORT)
    printed = runner.run(words, *few, change=[("R-50.pth", "resnet50.pth")])
    assert re.search(r"\| GN calibrated \| \S+ ± 0\.0 \(1 seed\) \|", printed)
    assert (checkout / "output/study_calibration/plot.png").exists()


def test_study_norms(checkout, runner):
    """Of a study that was interrupted only the rest is trained, and all of it is reported."""
    words, clips = commands(TOOLS, "python tools/study_norms.py")
    study = load_tool("study_norms")
    folder = checkout / "output/study"
    make_shapes(folder / "shapes", num_train=12, num_val=2)
    opts = ["PRETRAIN.EPOCHS", "1", "PRETRAIN.STEPS", "()", "PRETRAIN.IMAGE_SIZE", "33"]
    settings = {"config": study.CONFIG, "opts": opts, "pictures": list(study.IMAGES)}
    models = study.models_of(study.TABLES)
    left = [study.Model("GN"), study.Model("BN", batch=2)]
    done = [m for m in models if m not in left]
    assert len(done) == 25
    runs = [{"model": m._asdict(), "seed": 0, "error": 12.5} for m in done]
    (folder / "results.json").write_text(json.dumps({"settings": settings, "runs": runs}))
    runner.run(words, "--seeds", "1", *opts)
    results = json.loads((folder / "results.json").read_text())
    assert results["runs"][:25] == runs and len(results["runs"]) == 27
    new = {(r["model"]["norm"], r["model"]["batch"]): r for r in results["runs"][25:]}
    crops = len(list((folder / "shapes/crops/train").glob("*/*.png")))
    for (_, batch), one in new.items():
        assert one["iterations"] == round(crops / batch) and 0 <= one["error"] <= 100
        assert one["learning_rate"] == pytest.approx(0.01 * batch / 32)
    text = (folder / "results.md").read_text()
    gn, bn = (f"{new[key]['error']:.1f} (" for key in (("GN", 32), ("BN", 2)))
    table = re.findall(r"^\| (\S.*?) \| (.*) \|$", text, re.MULTILINE)
    rows = {name.strip(): [c.strip() for c in cells.split("|")] for name, cells in table}
    assert rows["error"][4].startswith(gn) and rows["GN"][0].startswith(gn)
    assert rows["BN"][3].startswith(bn) and rows["BRN"][:2] == ["", ""]
    assert rows["error"][0] == "12.5 (12.5–12.5)" and len(rows["channels per group"]) == 7
    assert (folder / "results.png").stat().st_size > 10_000
    make_moving_shapes(checkout / "output/study_clips/moving_shapes", 16, 4)
    runner.run(clips, "--seeds", "1", *opts)
    runs = json.loads((checkout / "output/study_clips/results.json").read_text())["runs"]
    assert sorted(run["model"]["passes"] for run in runs) == [1, 1, 4, 8]
    assert all(run["iterations"] == 1 for run in runs)
    assert "| BN " in (checkout / "output/study_clips/results.md").read_text()


def test_replicate(checkout, runner):
    """Of a replication that was interrupted the last detector is trained, and all are judged."""
    (words,) = commands(TOOLS, "python tools/replicate.py")
    replicate = load_tool("replicate")
    output = checkout / "output/replicate"
    make_shapes(output / "datasets/shapes", num_train=6, num_val=2)
    replication = replicate.Replication(output, replicate.PROFILES["cpu"], [0, 1], SHORT)
    detectors = [replication.fine_tuning(d, seed) for d in replication.detectors for seed in (0, 1)]
    for training in (*replication.pretrainings(), *detectors):
        finish(training)
    (scratch,) = (t for t in detectors if t.name == "GN from scratch, long, seed 1")
    (scratch.folder / scratch.product).unlink()
    runner.run(words, "--profile", "cpu", "--seeds", "0", "1", "--opts", *SHORT)
    assert (scratch.folder / "model_final.pth").exists()
    results = json.loads((output / "results.json").read_text())
    verdicts = {c[kind]["verdict"] for c in results["claims"] for kind in ("box", "mask")}
    assert verdicts == {"too little learned"}
    assert (output / "results.md").read_text() == replicate.markdown(results)
    assert (output / "results.png").stat().st_size > 10_000


def test_install_detectron2(runner):
    (words,) = commands(TOOLS, "python tools/install_detectron2.py")
    assert "nothing to do" in runner.run(words)


# READMEs of packages


def test_data(checkout, runner):
    page = BY_NAME["gn_det/data/README.md"]
    (check,) = commands(page, "python tools/train_net.py")
    printed = runner.run(check, *SHORT)
    assert "output/data/train.json: " in printed and "images per step" in printed
    make, clips = commands(page, "python tools/make_shapes.py")
    runner.run(clips)
    assert len(list((checkout / "datasets/moving_shapes").glob("*/*/*/*.png"))) == 48 * 12
    other = [("datasets/shapes", "datasets/other")]
    runner.run(make, change=[*other, ("--num-train 60 --num-val 10", "--num-train 6 --num-val 2")])
    made = checkout / "datasets/other"
    assert {path.name for path in made.iterdir()} >= {"images", "crops", "instances_train.json"}


def test_torchrun(runner):
    """tests/engine/test_distributed.py has a whole training."""
    (words,) = commands(BY_NAME["gn_det/engine/README.md"], "torchrun")
    few = "python -m torch.distributed.run --nproc-per-node 2"
    printed = runner.run(words, "--check", *CPU, change=[("torchrun --nproc-per-node 8", few)])
    assert printed.count("per pass on 2 GPUs") == 1, "printed by one of them"


def test_every_command_was_run(request, runner):
    """A new command in any README.md needs a test above."""
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    names = {name for name in globals() if name.startswith("test_")}
    if {getattr(item, "originalname", item.name) for item in mine} != names:
        pytest.skip("only some of the tests are run")
    assert len(COMMANDS) > 30 and not [c for c in COMMANDS if c not in runner.done]


# Form and facts


def test_limits():
    assert len(README.text.splitlines()) <= 150
    assert len(README.text.split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_form(page):
    """Tables are tables, with rows of one line, and words are the field's."""
    assert len(page.tables) == len(re.findall(r"^(\|-+)+\|$", page.text, re.MULTILINE))
    assert max(map(len, re.findall(r"^\|.*", page.text, re.MULTILINE)), default=0) <= 160
    words = r"\b(pictures?|told|mend(s|ed|ing)?|data sets?)\b"
    found = re.search(words, page.prose, re.IGNORECASE)
    assert not found, page.prose[max(found.start() - 40, 0) : found.end() + 40]


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.name)
def test_links(page):
    assert page.links
    for link in page.links:
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.folder / path).resolve() if path else ROOT / page.name
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in Page(str(target.relative_to(ROOT))).anchors, link


def test_map_of_packages():
    """Every package of gn_det, and every other folder, in at most 12 lines."""
    (block,) = CONTRIBUTING.blocks("text")
    named = [line.split()[0] for line in block.splitlines()]
    packages = {f"gn_det/{p.parent.name}/" for p in (ROOT / "gn_det").glob("*/__init__.py")}
    assert {*named} == {*packages, "gn_det/", "configs/", "tools/", "tests/"}
    assert len(named) <= 12


@pytest.mark.parametrize("case", measured.TABLES, ids=lambda case: f"{case.page}, {case.head[0]}")
def test_measured_tables(case):
    """What stands in a table is what its file of results has, rounded."""
    (table,) = (t for t in BY_NAME[case.page].tables if t.head == case.head)
    expected = case.expected(table)
    assert [list(row) for row in table.rows] == expected


def test_all_tables_with_decimals_are_known():
    """They are compared above, or hold what others published, or values of keys and flags."""
    known = {(case.page, case.head) for case in measured.TABLES} | measured.PUBLISHED
    for page in PAGES:
        for table in page.tables:
            cells = " ".join(cell for row in table.rows for cell in row)
            if re.search(r"\d\.\d", cells) and table.head[0] not in ("key", "flag"):
                assert (page.name, table.head) in known, table.head


def test_no_measured_number_stands_twice():
    text = " ".join(page.text for page in PAGES)
    found = re.findall(r"\d+\.\d ± \d+\.\d / \d+\.\d ± \d+\.\d", text)
    assert len(found) > 40 and len(found) == len(set(found))


def test_generated_pages():
    """The replication's page is the one that its results give."""
    replicate = load_tool("replicate")
    folder = ROOT / "tools/results"
    results = json.loads((folder / "replicate.json").read_text())
    assert (folder / "replicate.md").read_text() == replicate.markdown(results)
