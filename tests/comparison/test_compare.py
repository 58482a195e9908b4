"""`tools/compare.py`: the plan of a comparison, and a complete one on a small dataset."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, enable_sigint
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_backbone, build_model
from small_comparison import comparison, words

import gn_det.comparison.jobs as jobs_module
import gn_det.files as files_module
from gn_det import load_predictor
from gn_det.checkpoint.facts import describe
from gn_det.comparison.cells import (
    Cell,
    check_pairs,
    compared_pairs,
    describe_norms,
    make_cells,
    norm_keys,
)
from gn_det.comparison.compare import describe_cells
from gn_det.comparison.compare import run as run_compare
from gn_det.comparison.initial_weights import choose_weights, find_weights
from gn_det.comparison.jobs import run_trainings
from gn_det.config_file import read_config
from gn_det.engine.describe import filled_parts
from gn_det.engine.predictor import load_run
from gn_det.errors import InputError
from gn_det.evaluation.coco_stats import coco_stats
from gn_det.files import locked

FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_4conv1fc.yaml"


@pytest.fixture(scope="module")
def compared(shapes, tmp_path_factory) -> tuple[Path, str]:
    """A comparison that was interrupted in its second run, and then resumed."""
    output = tmp_path_factory.mktemp("compare") / "out"
    arguments = ["tools/compare.py", *words(shapes, output, "--rates", "1", "2")]
    silence = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, preexec_fn=enable_sigint, **silence
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


def test_resume_keeps_finished_runs(compared):
    _, printed = compared
    finished = re.findall(r"^\[ 0:\d\d\] (.*): already finished$", printed, re.MULTILINE)
    trials = [f"{norm}, batch size 2, rate x{x}" for norm in ("LN", "GN") for x in (1, 2)]
    assert finished == [*trials, "LN, batch size 2, seed 0"]
    assert "train: " in printed and "without objects" in printed
    assert re.search(r"^\[ 0:\d\d\] GN, batch size 2, seed 0$", printed, re.MULTILINE)


def test_report_numbers(compared, shapes):
    """The metrics are those of pycocotools on the runs' detections."""
    output, printed = compared
    results = json.loads((output / "results.json").read_text())
    assert results["answer"] in printed and results["answer"] in (output / "report.md").read_text()
    assert [(r["norm"], r["seed"]) for r in results["runs"]] == [("LN", 0), ("GN", 0)]
    for run in results["runs"]:
        detections = Path(run["folder"]) / "inference" / "coco_instances_results.json"
        assert run["bbox"] == coco_stats(shapes / "instances_val.json", detections)["bbox"]
    (rates,) = results["tables"]
    assert [row[0] for row in rates["rows"]] == ["LN", "LN", "GN", "GN"]
    shown = [(output / f"report.{end}").read_text() for end in ("md", "html")]
    assert all(rates["title"] in text and rates["rows"][0][2] in text for text in shown)
    gaps = {gap["of"]: gap for gap in results["differences"]}
    ln, gn = results["runs"]
    assert gaps["box"]["mean"] == pytest.approx(gn["bbox"]["AP"] - ln["bbox"]["AP"])
    assert gaps["mask"]["baseline"] == "LN" and gaps["mask"]["seeds"] == [0]


def test_best_model_loads(compared, tmp_path):
    """Detectron2's predictor loads the best model's folder, with the weights of the run."""
    output, _ = compared
    results = json.loads((output / "results.json").read_text())
    best = max(results["runs"], key=lambda run: run["segm"]["AP"])
    assert results["best"]["folder"] == best["folder"]
    cfg, categories = load_run(output / "best", tmp_path, [])
    assert [c["id"] for c in categories] == [1, 2, 3, 4, 5, 6]
    predictor = DefaultPredictor(cfg)
    original = torch.load(Path(best["folder"]) / "model_final.pth", weights_only=True)["model"]
    state = predictor.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
    loaded = load_predictor(output / "best", "MODEL.DEVICE", "cpu")
    assert loaded.metadata.thing_classes == [c["name"] for c in categories]
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    one, two = (model(image)["instances"] for model in (loaded, predictor))
    assert torch.equal(one.pred_boxes.tensor, two.pred_boxes.tensor)
    assert torch.equal(one.scores, two.scores)


def test_model_card(compared):
    """What a stranger to the folder has to know."""
    output, _ = compared
    results = json.loads((output / "results.json").read_text())
    best = max(results["runs"], key=lambda run: run["segm"]["AP"])
    card = (output / "best" / "README.md").read_text()
    row = f"| this model | {best['bbox']['AP']:.1f} | {best['segm']['AP']:.1f} |"
    assert row in card and results["answer"] in card
    for fact in (*results["facts"]["training set"], *results["facts"]["recipe"], "triangle"):
        assert fact.replace("*", "").split("(")[0] in card.replace("\\", "").replace("*", "")
    plain = get_cfg()
    with pytest.raises(KeyError):
        plain.merge_from_file(str(output / "best" / "config.yaml"))
    # The file says what is missing
    assert "gn_det.add_gn_config(cfg)" in (output / "best" / "config.yaml").read_text()


def test_runs_differ_only_in_the_norm(compared):
    output, _ = compared
    lines = [
        (output / "runs" / f"{norm}_2_seed0" / "config.yaml").read_text().splitlines()
        for norm in ("LN", "GN")
    ]
    different = {a.split(":")[0].strip() for a, b in zip(*lines, strict=True) if a != b}
    assert different == {"NORM", "OUTPUT_DIR"}, "no rate is better after so few iterations"


def test_predictions_equal_the_evaluation(compared, shapes, tmp_path):
    """`tools/predict.py` writes the same COCO results as the evaluation of the best model."""
    output, _ = compared
    truth = json.loads((shapes / "instances_val.json").read_text())
    images = [shapes / "images" / image["file_name"] for image in truth["images"]]
    arguments = ["tools/predict.py", "--model", output / "best", *images]
    done = command(*arguments, "--output-dir", tmp_path, "--min-score", 0.0)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.jpg"))) == len(images)
    predicted = json.loads((tmp_path / "coco_instances_results.json").read_text())
    folder = Path(json.loads((output / "results.json").read_text())["best"]["folder"])
    expected = json.loads((folder / "inference/coco_instances_results.json").read_text())
    names = {image["id"]: image["file_name"] for image in truth["images"]}

    def key(result, name):
        return name, result["category_id"], round(result["score"], 4), result["segmentation"]

    ours = sorted(str(key(r, Path(r["file_name"]).name)) for r in predicted)
    assert ours == sorted(str(key(r, names[r["image_id"]])) for r in expected) and ours


def test_other_settings_are_refused(compared, shapes):
    output, _ = compared
    done = command("tools/compare.py", *words(shapes, output), "SOLVER.BASE_LR", "0.001")
    assert done.returncode == 1
    assert re.match(rf"error: {output} .*config\.yaml differs.*--output-dir", done.stderr)
    assert (output / "results.json").exists(), "existing files are kept"


def test_output_folder_is_locked(shapes, tmp_path, monkeypatch):
    """The lock is taken before the first file is written, for --check too."""
    monkeypatch.setattr(files_module, "LOCK_TIMEOUT", 0.0)
    for more in ([], ["--check"]):
        with locked(tmp_path), pytest.raises(SystemExit, match=re.escape(str(tmp_path))):
            run_compare(words(shapes, tmp_path, *more))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_failed_run_does_not_stop_the_others(shapes, tmp_path, monkeypatch, capsys):
    """On two GPUs each run sees one of them, and all but the failed run finish."""
    plan = comparison(shapes, tmp_path, "--images-per-batch", "1", "2")
    seen = []

    def launch(self, arguments, folder, show, environment):
        seen.append((folder.name, environment["CUDA_VISIBLE_DEVICES"]))
        time.sleep(0.05)
        for iteration in (2, 5):
            show(f"eta: 0:00:00  iter: {iteration}  total_loss: 1")
        if folder.name == "GN_1_seed0":
            raise InputError("out of memory")

    monkeypatch.setattr(jobs_module.Launcher, "launch", launch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    failed = run_trainings(list(plan.cells.values()), tmp_path, at_once=2)
    assert failed == {"GN, batch size 1, seed 0": "out of memory"}
    assert len(seen) == 4 and {gpu for _, gpu in seen} == {"0", "1"}
    printed = capsys.readouterr().out
    assert re.search("GN, batch size 1, seed 0 FAILED, .*: out of memory", printed)
    # 6 of 6 iterations with 2 images, and 6 of 12 with 1 image
    shares = [int(share) for share in re.findall(r"(\d+)% of all runs, \d+ min left \| ", printed)]
    assert shares == sorted(shares) and shares[-1] == round(100 * (2 * 12 + 2 * 6) / 48)


def test_time_left_after_a_resume(shapes, tmp_path, monkeypatch, capsys):
    """Iterations of the earlier command do not count: 2 took 2 minutes, and 6 of 12 are left."""
    first, second = comparison(shapes, tmp_path).cells.values()
    seconds = iter((0, 0, 50, 170, 180))
    monkeypatch.setattr(jobs_module.time, "monotonic", lambda: next(seconds))
    progress = jobs_module.Progress([first, second])
    progress.begin(first)
    progress.advance(first, "eta: 0:00:00  iter: 2  total_loss: 1")
    progress.advance(first, "eta: 0:00:00  iter: 4  total_loss: 1")
    progress.advance(second, "eta: 0:00:00  iter: 0  total_loss: 1")
    assert re.search(r"50% of all runs, 6 min left", capsys.readouterr().out)


def test_all_batch_sizes_see_equally_many_images(shapes, tmp_path):
    plan = comparison(shapes, tmp_path, "--images-per-batch", "1", "2")
    assert len(plan.cells) == 4
    for cell, training in plan.cells.items():
        cfg = training.cfg
        assert cfg.SOLVER.IMS_PER_BATCH == cell.images
        assert cfg.SOLVER.MAX_ITER * cell.images == 12
        assert pytest.approx(0.02 * cell.images / 2) == cfg.SOLVER.BASE_LR
        assert cell.norm == cfg.MODEL.RESNETS.NORM == cfg.MODEL.ROI_MASK_HEAD.NORM


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["SOLVER.MAX_ITER", "5"], "SOLVER.MAX_ITER .* --budget"),
        (["MODEL.FPN.NORM", "GN"], "MODEL.FPN.NORM .* --norms"),
        (["MODEL.WEIGHTS", "x.pth"], "MODEL.WEIGHTS .* --init"),
        (["--norms", "GN", "GN"], "--norms GN GN: .*duplicate"),
        (["--norms", "XN"], "--norms XN: .*FrozenBN, BN"),
        (["--images-per-batch", "0"], "--images-per-batch must be 1 or larger"),
        (["--norms", "FrozenBN", "GN"], r"FrozenBN, batch size 2, seed 0: MODEL.RESNETS.NORM"),
        (["--seeds", "-1"], "--seeds must be 0 or larger"),
        (["SOLVER.BASE_LR", "0.1", "--check"], "--check: .* KEY VALUE pairs"),
        (["--base", "NOT.THERE"], "NOT.THERE"),
        (["VIS_PERIOD", "1", "SEED", "3"], "SEED .* --seeds"),
        (["--budget", "soon"], "--budget soon: .*24epochs"),
        (["--val-fraction", "0.5"], "--val-fraction and --group-by .*--val"),
    ],
)
def test_invalid_arguments(more, message, shapes, tmp_path):
    with pytest.raises(InputError, match=message):
        comparison(shapes, tmp_path, *more)


def test_cells_are_ordered_by_seed():
    cells = make_cells(["FrozenBN", "GN"], [1, 2], [3, 4])
    assert [cell.seed for cell in cells] == [3] * 4 + [4] * 4
    assert cells[0] == Cell("FrozenBN", 1, 3) and cells[-1] == Cell("GN", 2, 4)


def test_norm_keys():
    """The norm of the backbone, and that of FPN and heads, as in Table 5."""
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
    """Parts without norm layers are left out."""
    described = []
    for name in ("R_50_FPN_1x_4conv1fc", "R_50_C4_1x", "R_50_FPN_1x"):
        cfg = read_config(f"COCO-InstanceSegmentation/mask_rcnn_{name}.yaml")
        words = [word for pair in norm_keys("GN", cfg).items() for word in pair]
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(words)
        described.append(describe_norms(cfg))
    assert described == [
        *("GN: backbone, FPN, box head, mask head", "GN: backbone"),
        "GN: backbone, FPN, mask head",
    ]


def test_pairs_that_differ_in_more_than_the_norm():
    one, two = (read_config(FPN, ["SOLVER.BASE_LR", rate]) for rate in ("0.01", "0.02"))
    cells = Cell("FrozenBN", 2, 0), Cell("GN", 2, 0), Cell("GN", 1, 0)
    check_pairs({cells[0]: one, cells[2]: two})
    with pytest.raises(InputError, match=r": SOLVER.BASE_LR 0.01 and 0.02$"):
        check_pairs({cells[0]: one, cells[1]: two})
    deeper = read_config(FPN, ["SOLVER.BASE_LR", "0.01", "MODEL.RESNETS.DEPTH", "101"])
    with pytest.raises(InputError, match=r": MODEL.RESNETS.DEPTH 50 and 101$"):
        check_pairs({cells[0]: one, cells[1]: deeper})


def test_a_norm_may_have_its_own_recipe():
    """With the values of that recipe, and with no other."""
    key = "SOLVER.BACKBONE_MULTIPLIER"
    one, two, three = (read_config(FPN, [key, factor]) for factor in ("1.0", "0.1", "0.5"))
    cells = Cell("FrozenBN", 2, 0), Cell("GN", 2, 0)
    own = {"FrozenBN": {}, "GN": {key: 0.1}}
    check_pairs({cells[0]: one, cells[1]: two}, own)
    for baseline, other in ((one, three), (two, one)):
        with pytest.raises(InputError, match=key):
            check_pairs({cells[0]: baseline, cells[1]: other}, own)


def test_compared_pairs():
    """All with the first, and the GN backbone with the other of the same heads."""
    pairs = compared_pairs(["FrozenBN", "FrozenBN/GN", "GN"])
    assert pairs == [("FrozenBN/GN", "FrozenBN"), ("GN", "FrozenBN"), ("GN", "FrozenBN/GN")]
    assert compared_pairs(["FrozenBN", "GN"]) == [("GN", "FrozenBN")]


MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


def test_published_weights():
    """Without --init: the base config's weights, and for GN those of the same depth."""
    cfg = read_config(FPN)
    assert cfg.MODEL.WEIGHTS == MSRA
    weights = find_weights(["FrozenBN", "GN", "FrozenBN/GN"], [], cfg, [], Path("nowhere"))
    gn = "catalog://ImageNetPretrained/FAIR/R-50-GN"
    assert weights == {"FrozenBN": MSRA, "GN": gn, "FrozenBN/GN": MSRA}
    given = ["FrozenBN=a.pth", "GN=b.pth"]
    weights = find_weights(["FrozenBN", "GN", "FrozenBN/GN"], given, cfg, [], Path("nowhere"))
    assert weights == {"FrozenBN": "a.pth", "GN": "b.pth", "FrozenBN/GN": "a.pth"}
    assert find_weights(["GN"], ["GN="], cfg, [], Path("nowhere")) == {"GN": ""}, "from scratch"
    with pytest.raises(InputError, match=r"has BN: .* --init LN=FILE"):
        choose_weights("LN", MSRA, cfg)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a.pth", "b.pth"], "--init a.pth b.pth: .* GN=b.pth"),
        (["LN=a.pth"], "--init LN=a.pth: .*--norms"),
    ],
)
def test_ambiguous_initial_weights(given, message):
    with pytest.raises(InputError, match=message):
        find_weights(["FrozenBN", "GN"], given, read_config(FPN), [], Path("nowhere"))


def test_bn_backbone_is_converted_to_gn(shapes, tmp_path):
    """--init with a BN file: BN* uses it, and GN a conversion that is made once."""
    from gn_det.checkpoint.save import save_backbone

    cfg = read_config("Shapes/mask_rcnn_R_18_FPN_bn.yaml")
    torch.manual_seed(0)
    save_backbone(build_backbone(cfg).bottom_up.state_dict(), cfg, tmp_path / "bn.pth")
    more = ["--norms", "FrozenBN", "GN", "--init", str(tmp_path / "bn.pth"), "--check"]
    plan = comparison(shapes, tmp_path / "out", *more)
    weights = {cell.norm: Path(t.cfg.MODEL.WEIGHTS) for cell, t in plan.cells.items()}
    assert weights["FrozenBN"] == tmp_path / "bn.pth"
    assert weights["GN"].parent == tmp_path / "out" / "backbones"
    # The converted backbone has its own recipe, which the report shows
    configs = {cell.norm: training.cfg for cell, training in plan.cells.items()}
    assert configs["GN"].MODEL.GROUP_NORM.DIM_PER_GP == 16
    assert {c.MODEL.GROUP_NORM.HEADS_DIM_PER_GP for c in configs.values()} == {2}
    assert configs["GN"].SOLVER.BACKBONE_MULTIPLIER == 0.1
    assert configs["FrozenBN"].SOLVER.BACKBONE_MULTIPLIER == 1
    gn = next(line for line in describe_cells(plan) if line.startswith("GN"))
    assert "SOLVER.BACKBONE_MULTIPLIER 0.1" in gn and "DIM_PER_GP 16" in gn
    given = ["SOLVER.BACKBONE_MULTIPLIER", "0.5", "MODEL.GROUP_NORM.NUM_GROUPS", "8"]
    own = comparison(shapes, tmp_path / "own", *more, *given)
    for training in own.cells.values():
        assert training.cfg.SOLVER.BACKBONE_MULTIPLIER == 0.5
        assert training.cfg.MODEL.GROUP_NORM.DIM_PER_GP == -1
        assert training.cfg.MODEL.GROUP_NORM.HEADS_DIM_PER_GP == -1
    modified = weights["GN"].stat().st_mtime_ns
    comparison(shapes, tmp_path / "out", *more)
    assert weights["GN"].stat().st_mtime_ns == modified
    # Another file of the same name is converted again
    torch.manual_seed(1)
    save_backbone(build_backbone(cfg).bottom_up.state_dict(), cfg, tmp_path / "bn.pth")
    plan = comparison(shapes, tmp_path / "out", *more)
    assert str(weights["GN"]) not in {t.cfg.MODEL.WEIGHTS for t in plan.cells.values()}


def test_only_the_backbone_of_a_detector_is_used(shapes, tmp_path):
    """All norms start alike: the heads of a whole BN* detector fit only one of them."""
    cfg = read_config("Shapes/mask_rcnn_R_18_FPN_frozenbn.yaml", ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    path = tmp_path / "detector.pth"
    state = build_model(cfg).state_dict()
    torch.save({"model": state}, path)
    norms = ["--norms", "FrozenBN", "FrozenBN/GN", "GN", "--init"]
    plan = comparison(shapes, tmp_path / "out", *norms, str(path), "--check")
    for training in plan.cells.values():
        assert filled_parts(training.cfg) == {"ResNet"}
    assert any(note.startswith(f"--init {path}: ") for note in plan.notes)
    frozen = torch.load(next(iter(plan.cells.values())).cfg.MODEL.WEIGHTS, weights_only=True)
    name = "res2.0.conv1.weight"
    assert torch.equal(frozen["model"][name], state[f"backbone.bottom_up.{name}"])
    # Files of your own for each norm must fill the same parts
    backbone = plan.cells[Cell("GN", 2, 0)].cfg.MODEL.WEIGHTS
    with pytest.raises(InputError, match=r"--init: .*FrozenBN.* FPN"):
        comparison(
            *(shapes, tmp_path / "two", "--norms", "FrozenBN", "GN", "--init"),
            *(f"FrozenBN={path}", f"GN={backbone}", "--check"),
        )


@pytest.mark.parametrize("given", [[], ["MODEL.PIXEL_STD", "[1.0,1.0,1.0]"]])
def test_pixels_that_a_backbone_does_not_record(given, shapes, tmp_path):
    """BN* and the conversion use the same pixels: the config's, or the user's."""
    name = "Shapes/mask_rcnn_R_18_FPN_bn.yaml"
    cfg = read_config(name)
    path = tmp_path / "bn.pth"
    state = build_backbone(cfg).bottom_up.state_dict()
    torch.save({"model": state, "matching_heuristics": True}, path)
    more = ["--base", name, "--norms", "FrozenBN", "GN", "--init", str(path), "--check", *given]
    plan = comparison(shapes, tmp_path / "out", *more)
    std = [1.0, 1.0, 1.0] if given else cfg.MODEL.PIXEL_STD
    assert [list(t.cfg.MODEL.PIXEL_STD) for t in plan.cells.values()] == [std, std]
    (converted,) = (tmp_path / "out" / "backbones").glob("*.pth")
    assert describe(str(converted))["MODEL.PIXEL_STD"] == std
    (note,) = [note for note in plan.notes if note.startswith(f"MODEL.PIXEL_STD {std}: ")]
    assert "bn.pth" in note


def test_check_does_not_train(shapes, tmp_path, capsys):
    from gn_det.comparison.compare import run

    run(words(shapes, tmp_path, "--check"))
    printed = capsys.readouterr().out
    assert "adapted to the dataset" in printed and "LN, batch size 2, seed 0" in printed
    assert "norm layers      ResNet: 20 GN (32 groups)" in printed
    assert not (tmp_path / "runs").exists()
    # The data and the runs, as they stand in the file and in the command
    printed = printed.partition("this comparison")[2]
    for name, images in (("train", "training set"), ("val", "validation set")):
        content = json.loads((shapes / f"instances_{name}.json").read_text())
        real = [a for a in content["annotations"] if not a["iscrowd"]]
        (line,) = (line for line in printed.splitlines() if line.startswith(images + " " * 3))
        assert f"{len(content['images'])} images, {len(real)} objects of 6 classes" in line
        for category in content["categories"]:
            count = sum(a["category_id"] == category["id"] for a in real)
            assert f"{category['name']} {count}" in printed
    assert "Mask R-CNN" in printed and "training runs    2: 2 of 6 iterations" in printed


def test_train_net_accepts_the_same_data(shapes, tmp_path, capsys):
    from gn_det.engine.train import run

    images = str(shapes / "images")
    flags = ["--config-file", FPN, "--check"]
    data = ["--train", str(shapes / "instances_train.json"), images, "--val-fraction", "0.4"]
    run([*flags, *data, "OUTPUT_DIR", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "train: " in printed and f"{tmp_path}/data/train.json: " in printed
    with pytest.raises(SystemExit, match=r"--val-fraction .*--train JSON IMAGES"):
        run([*flags, "--val-fraction", "0.4"])
    # The data have six classes, and another number is refused
    with pytest.raises(SystemExit, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES 80"):
        run([*flags, *data, "OUTPUT_DIR", str(tmp_path), "MODEL.ROI_HEADS.NUM_CLASSES", "80"])


def test_sigterm_stops_the_training_run(shapes, tmp_path):
    """SIGTERM also terminates the subprocess, and the exit code is that of the signal."""
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


def test_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"config.yaml.* OUTPUT_DIR"):
        load_run(tmp_path, tmp_path, [])
