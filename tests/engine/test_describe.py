"""`tools/train_net.py --check` prints the recipe without training."""

import io
import json
import re
import warnings
from contextlib import redirect_stdout

import pytest
import torch
from conftest import ROOT, SCRATCH, TINY, command, shapes_config
from detectron2.modeling import build_model

from gn_det.engine import pretrain, train

PAPER = "configs/Detectron1-Comparisons"
SHAPES = "configs/Shapes/mask_rcnn_R_18_FPN_gn.yaml"


def check(config: str, *words: object, tool=train) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        tool.run(["--config-file", str(ROOT / config), "--check", *map(str, words)])
    return printed.getvalue()


def section(printed: str, title: str) -> list[str]:
    """The lines of one section, without its title."""
    match = re.search(rf"^{title} .*(?:\n {{17}}.*)*", printed, re.MULTILINE)
    return [line[17:] for line in match[0].splitlines()]


@pytest.fixture(scope="module")
def gn(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("check")
    opts = ("--num-gpus", 8, "OUTPUT_DIR", folder / "run")
    printed = check(f"{PAPER}/mask_rcnn_R_50_FPN_noaug_2x_gn.yaml", *opts)
    assert not (folder / "run").exists(), "nothing may be written"
    return printed


def test_norms_of_each_part(gn):
    """ResNet-50 has 53 convolutions, 11 of them in the stem and res2."""
    norms = section(gn, "norm layers")
    assert norms[0] == "ResNet: 53 GN (32 groups); 11 with gamma and beta frozen"
    assert norms[1:3] == ["FPN: 8 GN (32 groups)", "RPN: none"]
    assert {"box head: 4 GN (32 groups)", "mask head: 4 GN (32 groups)"} <= set(norms)
    assert section(gn, "frozen")[0] == "stages: stem, res2 (MODEL.BACKBONE.FREEZE_AT 2)"


def test_batch_and_schedule_by_number_of_gpus(gn):
    assert section(gn, "batch") == ["16 images per step: 2 per pass on 8 GPUs"]
    rates = ["step 0: 0.006667", "step 500: 0.02", "step 120,000: 0.002", "step 160,000: 0.0002"]
    assert section(gn, "learning rate") == [*rates, "step 180,000: the end"]
    path = f"{PAPER}/mask_rcnn_R_50_FPN_noaug_2x_gn.yaml"
    one = check(path, "SOLVER.ACCUMULATE_ITERS", 2)
    assert section(one, "batch") == ["2 images per step: 1 per pass on 1 GPU, 2 passes"]
    assert section(one, "learning rate")[2] == "step 960,000: 0.00025"


def test_published_weights(gn):
    """The released R-50-GN has 53 convolutions, each with gamma and beta: 159 tensors."""
    weights = section(gn, "initial weights")
    assert weights[1] == "loaded: 159 of 223 tensors (ResNet 159)"
    assert weights[2].startswith("random: 64 of 223 tensors (FPN 24, RPN 6, ")
    c4 = check(f"{PAPER}/mask_rcnn_R_50_C4_noaug_2x_gn.yaml")
    assert "res5 (RoI head) 30" in section(c4, "initial weights")[1]


def test_optimizer(gn):
    """No weight decay on gamma and beta; the rate of biases is doubled, as in Detectron."""
    lines = section(gn, "optimizer")
    assert lines[0] == "SGD, momentum 0.9"
    assert "58 norm tensors, learning rate 0.02, weight decay 0" in lines
    assert "58 norm tensors, learning rate 0.04, weight decay 0" in lines


def test_custom_weights_and_dataset(tmp_path, shapes):
    """The file is read to count the tensors that it fills, and the dataset to count epochs."""
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn")
    state = build_model(cfg).backbone.bottom_up.state_dict()
    state["left.over"] = state["stem.conv1.weight"].clone()
    path = tmp_path / "backbone.pth"
    content = {"model": state, "__author__": "me", "matching_heuristics": True}
    torch.save(content, path)
    keys = ("SOLVER.MAX_ITER", 60, "SOLVER.STEPS", "(50,)", "SOLVER.WARMUP_ITERS", 5)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        printed = check(SHAPES, *TINY, *keys, "MODEL.WEIGHTS", path)
    assert not [w for w in warned if "stem.conv1.weight" in str(w.message)]
    path_line, filled, random, unused = section(printed, "initial weights")
    assert path_line == str(path)
    assert filled.endswith("(ResNet 60)") and random.split(": ")[1].startswith("64 of 124")
    assert "(FPN 24" in random
    assert unused.startswith("unused: 1 tensors") and unused.endswith("left.over")
    annotations = json.loads((shapes / "instances_train.json").read_text())["annotations"]
    annotated = {a["image_id"] for a in annotations if not a["iscrowd"]}
    (data,) = section(printed, "training set")
    count = len(annotated)
    assert data == f"shapes_train: {count} images with annotations, {120 / count:.1f} epochs"


def test_pretraining():
    """Schedule in epochs, weight decay on gamma and beta, and no training folder."""
    path = "configs/ImageNet-Classification/R_50_gn.yaml"
    printed = check(path, "--num-gpus", 8, tool=pretrain)
    assert section(printed, "norm layers")[0] == "ResNet: 53 GN (32 groups)"
    assert section(printed, "training set")[0].startswith("imagenet/train NOT FOUND")
    rates = ["epoch 0: 0.1", "epoch 30: 0.01", "epoch 60: 0.001", "epoch 90: 0.0001"]
    assert section(printed, "learning rate") == [*rates, "epoch 100: the end"]
    assert "106 norm tensors, learning rate 0.1, weight decay 0.0001" in printed
    assert section(printed, "batch") == ["256 images per step: 32 per pass on 8 GPUs"]
    halves = check(path, "PRETRAIN.EPOCHS", 2, "PRETRAIN.STEPS", "(0.5,1.5)", tool=pretrain)
    assert section(halves, "learning rate")[1:3] == ["epoch 0.5: 0.01", "epoch 1.5: 0.001"]


def test_pretraining_on_a_folder(shapes):
    crops = len(list((shapes / "crops/train").glob("*/*.png")))
    keys = ("SOLVER.IMS_PER_BATCH", 8, "PRETRAIN.STEPS", "(2,)", "SOLVER.WARMUP_ITERS", 0)
    printed = check("configs/Shapes/pretrain_R_18_bn.yaml", *TINY, *keys, tool=pretrain)
    (data,) = section(printed, "training set")
    steps = round(4 * crops / 8)
    assert data == f"shapes/crops/train: {crops} images in 6 classes, 4 epochs in {steps} steps"
    first, second, _ = section(printed, "learning rate")
    assert first == "epoch 0: 0.0025" and second.endswith(": 0.00025"), (
        "0.01 is the rate for a batch of 32"
    )
    assert float(second.split()[1][:-1]) == pytest.approx(2, abs=0.2)


def test_missing_files_are_reported():
    printed = check(f"{PAPER}/mask_rcnn_R_50_C4_noaug_2x_ln.yaml")
    assert section(printed, "norm layers")[0].startswith("ResNet: 43 LN (one group)")
    assert section(printed, "initial weights") == ["R-50-LN.pth NOT FOUND: training would abort"]
    assert "coco_2017_train NOT FOUND" in section(printed, "training set")[0]


@pytest.mark.parametrize(
    ("opts", "kind"),
    [
        (("MODEL.GROUP_NORM.DIM_PER_GP", 16), "GN (16 channels per group)"),
        (("MODEL.GROUP_NORM.NUM_GROUPS", 8), "GN (8 groups)"),
        (("MODEL.RESNETS.NORM", "IN"), "IN (one channel per group)"),
        (("MODEL.RESNETS.NORM", "BN"), "BN"),
        (("MODEL.RESNETS.NORM", "SyncBN", "MODEL.DEVICE", "cuda"), "SyncBN"),
    ],
)
def test_kinds_of_norms(opts, kind):
    printed = check(SHAPES, *TINY, *SCRATCH, "SOLVER.STEPS", "()", *opts)
    assert section(printed, "norm layers")[0] == f"ResNet: 20 {kind}"


@pytest.mark.parametrize(
    "opts",
    [
        ("SOLVER.BACKBONE_MULTIPLIER", 0.1),
        ("SOLVER.NORM_LR_FACTOR", 10.0),
        ("SOLVER.BIAS_LR_FACTOR", 2.0),
        ("SOLVER.BASE_LR", 0.0),
    ],
)
def test_the_base_learning_rate_is_shown(opts):
    """Factors of parts of the model do not change it."""
    printed = check(SHAPES, *TINY, *SCRATCH, "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", 1, *opts)
    rate = shapes_config("mask_rcnn_R_18_FPN_gn", *opts).SOLVER.BASE_LR
    assert section(printed, "learning rate")[1] == f"step 1: {rate:.4g}"


def test_grouping_of_resnet_and_heads_may_differ():
    opts = ("MODEL.GROUP_NORM.DIM_PER_GP", 16, "MODEL.GROUP_NORM.HEADS_NUM_GROUPS", 64)
    printed = check(SHAPES, *TINY, *SCRATCH, "SOLVER.STEPS", "()", *opts)
    resnet, fpn, *_ = section(printed, "norm layers")
    assert resnet == "ResNet: 20 GN (16 channels per group)" and fpn == "FPN: 8 GN (64 groups)"


def test_check_reports_problems_and_fails():
    words = ("--check", "MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", 10)
    done = command("tools/train_net.py", "--config-file", SHAPES, *words)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: 2 problems in the config\n  - SOLVER.STEPS (320, 430): ")
    assert "\n  - MODEL.BACKBONE.FREEZE_AT 2: " in done.stderr
