"""`tools/compare.py`: the plan of a comparison, and a real one on a small data set."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, command, hear_interrupts
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_backbone

import gn_det.comparison.jobs as trainings_module
from gn_det.checkpoint.facts import describe
from gn_det.comparison.compare import parse, prepare_comparison
from gn_det.comparison.initial_weights import find_weights, published
from gn_det.comparison.jobs import run_trainings
from gn_det.comparison.plan import Cell, check_pairs, describe_norms, norm_keys, plan
from gn_det.config_file import read_config
from gn_det.engine.predict import load_run
from gn_det.errors import InputError
from gn_det.evaluation.coco_stats import coco_stats
from gn_det.files import locked

FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_4conv1fc.yaml"
# An untrained model is sure of nothing
KEYS = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
KEYS += [word for word in TINY if word not in ("SOLVER.IMS_PER_BATCH", "2", "MODEL.WEIGHTS", "")]


def words(shapes: Path, output: Path, *more: str) -> list[str]:
    """A comparison of two norms from scratch."""
    train, val = (str(shapes / f"instances_{split}.json") for split in ("train", "val"))
    images = str(shapes / "images")
    return [
        *("--train", train, images, "--val", val, images, "--output-dir", str(output)),
        *("--base", "Shapes/mask_rcnn_R_18_FPN_gn.yaml", "--init", "", "--budget", "6"),
        *("--norms", "LN", "GN", "--seeds", "0", *more, "MODEL.BACKBONE.FREEZE_AT", "0", *KEYS),
    ]


@pytest.fixture(scope="module")
def compared(shapes, tmp_path_factory) -> tuple[Path, str]:
    """A comparison that was interrupted in its second training, and run again to the end."""
    output = tmp_path_factory.mktemp("compare") / "out"
    arguments = ["tools/compare.py", *words(shapes, output)]
    silence = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, preexec_fn=hear_interrupts, **silence
    )
    deadline = time.monotonic() + 240
    while not (output / "runs" / "GN_2_seed0" / "config.yaml").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not (output / "results.json").exists()
    done = command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


def test_goes_on_from_what_is_finished(compared):
    _, printed = compared
    assert "LN, 2 a batch, seed 0: finished already" in printed
    assert "GN, 2 a batch, seed 0: finished" not in printed
    assert "train: " in printed and "pictures without objects" in printed
    assert re.search(r"^\[ 0:\d\d\] GN, 2 a batch, seed 0$", printed, re.MULTILINE)


def test_answers(compared, shapes):
    """The report's numbers are pycocotools' of the runs' own detections."""
    output, printed = compared
    results = json.loads((output / "results.json").read_text())
    assert results["answer"] in printed and results["answer"] in (output / "report.md").read_text()
    assert [(r["norm"], r["seed"]) for r in results["runs"]] == [("LN", 0), ("GN", 0)]
    for run in results["runs"]:
        detections = Path(run["folder"]) / "inference" / "coco_instances_results.json"
        assert run["bbox"] == coco_stats(shapes / "instances_val.json", detections)["bbox"]
    gaps = {gap["of"]: gap for gap in results["differences"]}
    ln, gn = results["runs"]
    assert gaps["box"]["mean"] == pytest.approx(gn["bbox"]["AP"] - ln["bbox"]["AP"])
    assert gaps["mask"]["baseline"] == "LN" and gaps["mask"]["seeds"] == [0]


def test_best_model_is_ready(compared, tmp_path):
    """Detectron2's own predictor takes the folder's config, and finds what the run found."""
    output, _ = compared
    results = json.loads((output / "results.json").read_text())
    best = max(results["runs"], key=lambda run: run["segm"]["AP"])
    assert results["best"]["folder"] == best["folder"]
    cfg, categories = load_run(output / "best", tmp_path)
    assert [c["id"] for c in categories] == [1, 2, 3, 4, 5, 6]
    predictor = DefaultPredictor(cfg)
    original = torch.load(Path(best["folder"]) / "model_final.pth", weights_only=True)["model"]
    state = predictor.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())


def test_trainings_differ_in_the_norm_alone(compared):
    output, _ = compared
    lines = [
        (output / "runs" / f"{norm}_2_seed0" / "config.yaml").read_text().splitlines()
        for norm in ("LN", "GN")
    ]
    different = {a.split(":")[0].strip() for a, b in zip(*lines, strict=True) if a != b}
    assert different == {"NORM", "OUTPUT_DIR"}


def test_draws_and_writes_what_it_finds(compared, shapes, tmp_path):
    """COCO results of the best model equal those that its own evaluation wrote."""
    output, _ = compared
    truth = json.loads((shapes / "instances_val.json").read_text())
    pictures = [shapes / "images" / image["file_name"] for image in truth["images"]]
    arguments = ["tools/predict.py", "--model", output / "best", *pictures]
    done = command(*arguments, "--output-dir", tmp_path, "--min-score", 0.0)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.jpg"))) == len(pictures)
    found = json.loads((tmp_path / "coco_instances_results.json").read_text())
    folder = Path(json.loads((output / "results.json").read_text())["best"]["folder"])
    expected = json.loads((folder / "inference/coco_instances_results.json").read_text())
    names = {image["id"]: image["file_name"] for image in truth["images"]}

    def key(result, name):
        return name, result["category_id"], round(result["score"], 4), result["segmentation"]

    ours = sorted(str(key(r, Path(r["file_name"]).name)) for r in found)
    assert ours == sorted(str(key(r, names[r["image_id"]])) for r in expected) and ours


def test_other_settings_are_refused(compared, shapes):
    output, _ = compared
    done = command("tools/compare.py", *words(shapes, output), "SOLVER.BASE_LR", "0.001")
    assert done.returncode == 1
    assert "was begun with other settings" in done.stderr
    assert (output / "results.json").exists(), "what was written stays"


def test_one_at_a_time_in_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="another command works in"):
        run_trainings([], tmp_path)
    assert run_trainings([], tmp_path) == {}


def comparison(shapes, output, *more):
    return prepare_comparison(parse(words(shapes, output, *more)))


def test_one_failure_does_not_lose_the_others(shapes, tmp_path, monkeypatch, capsys):
    """Over two GPUs: each training sees one of them, and all but the failed one are done."""
    found = comparison(shapes, tmp_path, "--images-per-batch", "1", "2")
    seen = []

    def launch(self, arguments, folder, show, environment):
        seen.append((folder.name, environment["CUDA_VISIBLE_DEVICES"]))
        time.sleep(0.05)
        show("eta: 0:00:00  iter: 5  total_loss: 1")
        if folder.name == "GN_1_seed0":
            raise InputError("out of memory")

    monkeypatch.setattr(trainings_module.Launcher, "launch", launch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    failed = run_trainings(list(found.cells.values()), tmp_path, at_once=2)
    assert failed == {"GN, 1 a batch, seed 0": "out of memory"}
    assert len(seen) == 4 and {gpu for _, gpu in seen} == {"0", "1"}
    printed = capsys.readouterr().out
    assert "GN, 1 a batch, seed 0 FAILED, the others go on: out of memory" in printed
    # 6 of its 6 iterations of 2 pictures, and 6 of 12 of a single one
    shares = [int(share) for share in re.findall(r"(\d+)%, all in \d+ min \| ", printed)]
    assert shares == sorted(shares) and shares[-1] == round(100 * (2 * 12 + 2 * 6) / 48)


def test_batches_see_equally_many_images(shapes, tmp_path):
    found = comparison(shapes, tmp_path, "--images-per-batch", "1", "2")
    assert len(found.cells) == 4
    for cell, training in found.cells.items():
        cfg = training.cfg
        assert cfg.SOLVER.IMS_PER_BATCH == cell.images
        assert cfg.SOLVER.MAX_ITER * cell.images == 12
        assert pytest.approx(0.02 * cell.images / 2) == cfg.SOLVER.BASE_LR
        assert cell.norm == cfg.MODEL.RESNETS.NORM == cfg.MODEL.ROI_MASK_HEAD.NORM


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["SOLVER.MAX_ITER", "5"], "SOLVER.MAX_ITER differs between the trainings: give --budget"),
        (["MODEL.FPN.NORM", "GN"], "MODEL.FPN.NORM differs .* give --norms"),
        (["MODEL.WEIGHTS", "x.pth"], "MODEL.WEIGHTS differs .* give --init"),
        (["--norms", "GN", "GN"], "--norms GN GN: give each once"),
        (["--norms", "XN"], "--norms XN: give FrozenBN, BN"),
        (["--images-per-batch", "0"], "a batch has one image or more"),
        (["--norms", "FrozenBN", "GN"], r"FrozenBN, 2 a batch, seed 0: MODEL.RESNETS.NORM"),
        (["--seeds", "-1"], "--seeds: below 0"),
        (["SOLVER.BASE_LR", "0.1", "--check"], "--check: flags stand before the KEY VALUE pairs"),
        (["--base", "NOT.THERE"], "there is no config NOT.THERE"),
        (["VIS_PERIOD", "1", "SEED", "3"], "SEED differs between the trainings: give --seeds"),
        (["--budget", "soon"], "--budget soon: give iterations"),
        (["--val-fraction", "0.5"], "--val-fraction and --group-by divide --train"),
    ],
)
def test_what_is_refused(more, message, shapes, tmp_path):
    with pytest.raises(InputError, match=message):
        comparison(shapes, tmp_path, *more)


def test_plan_has_whole_seeds_first():
    cells = plan(["FrozenBN", "GN"], [1, 2], [3, 4])
    assert [cell.seed for cell in cells] == [3] * 4 + [4] * 4
    assert cells[0] == Cell("FrozenBN", 1, 3) and cells[-1] == Cell("GN", 2, 4)


def test_norm_keys():
    """Table 5's notation: the backbone's norm, and that of all else."""
    cfg = read_config(FPN)
    rest = ("MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")
    for norm, backbone, heads in (
        ("FrozenBN", "FrozenBN", ""),
        ("GN", "GN", "GN"),
        ("FrozenBN/GN", "FrozenBN", "GN"),
    ):
        keys = norm_keys(norm, cfg)
        assert keys["MODEL.RESNETS.NORM"] == backbone
        assert [keys[key] for key in rest] == [heads] * 3
    c4 = read_config("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml")
    assert norm_keys("GN", c4) == {"MODEL.RESNETS.NORM": "GN", **dict.fromkeys(rest, "")}


def test_describe_norms():
    """Parts that have no layers for a norm are not said to have it."""
    told = []
    for name in ("R_50_FPN_1x_4conv1fc", "R_50_C4_1x", "R_50_FPN_1x"):
        cfg = read_config(f"COCO-InstanceSegmentation/mask_rcnn_{name}.yaml")
        words = [word for pair in norm_keys("GN", cfg).items() for word in pair]
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(words)
        told.append(describe_norms(cfg))
    assert told == [
        *("GN: backbone, FPN, box head, mask head", "GN: backbone"),
        "GN: backbone, FPN, mask head",
    ]


def test_pairs_that_differ_in_more():
    one, two = (read_config(FPN, ["SOLVER.BASE_LR", rate]) for rate in ("0.01", "0.02"))
    cells = Cell("FrozenBN", 2, 0), Cell("GN", 2, 0), Cell("GN", 1, 0)
    check_pairs({cells[0]: one, cells[2]: two})
    with pytest.raises(InputError, match=r"more than the norm: SOLVER.BASE_LR 0.01 and 0.02"):
        check_pairs({cells[0]: one, cells[1]: two})
    deeper = read_config(FPN, ["SOLVER.BASE_LR", "0.01", "MODEL.RESNETS.DEPTH", "101"])
    with pytest.raises(InputError, match=r"more than the norm: MODEL.RESNETS.DEPTH 50 and 101"):
        check_pairs({cells[0]: one, cells[1]: deeper})


MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


def test_published_weights():
    """Without --init: the base's own, and GN's of the same depth."""
    cfg = read_config(FPN)
    assert cfg.MODEL.WEIGHTS == MSRA
    found = find_weights(["FrozenBN", "GN", "FrozenBN/GN"], [], cfg, [], Path("nowhere"))
    gn = "catalog://ImageNetPretrained/FAIR/R-50-GN"
    assert found == {"FrozenBN": MSRA, "GN": gn, "FrozenBN/GN": MSRA}
    assert find_weights(["GN"], ["GN="], cfg, [], Path("nowhere")) == {"GN": ""}, "from scratch"
    with pytest.raises(InputError, match="has BN: give weights for LN, as --init LN=FILE"):
        published("LN", MSRA, cfg)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a.pth", "b.pth"], "say what for, as GN=b.pth"),
        (["LN=a.pth"], "--norms has no LN"),
    ],
)
def test_initial_weights_that_are_unclear(given, message):
    with pytest.raises(InputError, match=message):
        find_weights(["FrozenBN", "GN"], given, read_config(FPN), [], Path("nowhere"))


def test_bn_backbone_becomes_gn(shapes, tmp_path):
    """--init with a BN file: BN* takes it, and GN what is measured from it, once."""
    from gn_det.checkpoint.save import save_backbone

    cfg = read_config("Shapes/mask_rcnn_R_18_FPN_bn.yaml")
    torch.manual_seed(0)
    save_backbone(build_backbone(cfg).bottom_up.state_dict(), cfg, tmp_path / "bn.pth")
    more = ["--norms", "FrozenBN", "GN", "--init", str(tmp_path / "bn.pth"), "--check"]
    found = comparison(shapes, tmp_path / "out", *more)
    weights = {cell.norm: Path(t.cfg.MODEL.WEIGHTS) for cell, t in found.cells.items()}
    assert weights["FrozenBN"] == tmp_path / "bn.pth"
    assert weights["GN"].parent == tmp_path / "out" / "backbones"
    made = weights["GN"].stat().st_mtime_ns
    comparison(shapes, tmp_path / "out", *more)
    assert weights["GN"].stat().st_mtime_ns == made
    # Another file under the same name is another backbone
    torch.manual_seed(1)
    save_backbone(build_backbone(cfg).bottom_up.state_dict(), cfg, tmp_path / "bn.pth")
    found = comparison(shapes, tmp_path / "out", *more)
    assert str(weights["GN"]) not in {t.cfg.MODEL.WEIGHTS for t in found.cells.values()}


@pytest.mark.parametrize("given", [[], ["MODEL.PIXEL_STD", "[1.0,1.0,1.0]"]])
def test_pixels_that_a_backbone_does_not_tell(given, shapes, tmp_path):
    """BN* and what is measured from it get the same: the config's, or what the user gives."""
    name = "Shapes/mask_rcnn_R_18_FPN_bn.yaml"
    cfg = read_config(name)
    path = tmp_path / "bn.pth"
    torch.save({"model": build_backbone(cfg).bottom_up.state_dict()}, path)
    more = ["--base", name, "--norms", "FrozenBN", "GN", "--init", str(path), "--check", *given]
    found = comparison(shapes, tmp_path / "out", *more)
    std = [1.0, 1.0, 1.0] if given else cfg.MODEL.PIXEL_STD
    assert [list(t.cfg.MODEL.PIXEL_STD) for t in found.cells.values()] == [std, std]
    (converted,) = (tmp_path / "out" / "backbones").glob("*.pth")
    assert describe(str(converted))["MODEL.PIXEL_STD"] == std
    told = f"MODEL.PIXEL_STD {std}: the config's, since bn.pth does not tell its own"
    assert told in found.proposals


def test_check_trains_nothing(shapes, tmp_path, capsys):
    from gn_det.comparison.compare import run

    run(words(shapes, tmp_path, "--check"))
    printed = capsys.readouterr().out
    assert "made to fit" in printed and "LN, 2 a batch, seed 0" in printed
    assert "norm layers      ResNet: 20 GN (32 groups)" in printed
    assert not (tmp_path / "runs").exists()


def test_train_net_takes_the_same_data(shapes, tmp_path, capsys):
    from gn_det.engine.train import run

    images = str(shapes / "images")
    flags = ["--config-file", FPN, "--check"]
    data = ["--train", str(shapes / "instances_train.json"), images, "--val-fraction", "0.4"]
    run([*flags, *data, "OUTPUT_DIR", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "train: " in printed and f"{tmp_path}/data/train.json: " in printed
    with pytest.raises(SystemExit, match="need --train JSON IMAGES"):
        run([*flags, "--val-fraction", "0.4"])
    # Six classes are the data's, and what contradicts them is refused
    with pytest.raises(SystemExit, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES 80"):
        run([*flags, *data, "OUTPUT_DIR", str(tmp_path), "MODEL.ROI_HEADS.NUM_CLASSES", "80"])


def test_killed_with_its_training(shapes, tmp_path):
    """SIGTERM to the command ends the training that it started, and exits as the shell expects."""
    arguments = [sys.executable, "tools/compare.py", *words(shapes, tmp_path)]
    silence = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(arguments, cwd=ROOT, **silence)
    folder = tmp_path / "runs" / "LN_2_seed0"
    deadline = time.monotonic() + 120
    while not (folder / "config.yaml").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    time.sleep(1)
    before = (folder / "log.txt").stat().st_size
    time.sleep(2)
    assert (folder / "log.txt").stat().st_size == before


def test_models_that_cannot_predict(tmp_path):
    with pytest.raises(InputError, match=r"has no config.yaml: give the OUTPUT_DIR of a training"):
        load_run(tmp_path, tmp_path)
