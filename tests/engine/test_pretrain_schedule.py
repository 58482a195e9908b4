"""The schedule of the paper's ImageNet training, in Detectron2's iterations."""

import pytest
import torch
from conftest import ROOT
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from gn_det.config_file import read_config
from gn_det.engine.pretrain_schedule import resolve_config
from gn_det.errors import InputError

IMAGENET = (1_281_167, 1000)
LEAVES = sorted((ROOT / "configs/ImageNet-Classification").glob("*.yaml"))


def config(name: str, *opts: object) -> CfgNode:
    path = f"ImageNet-Classification/{name}.yaml"
    return read_config(path, list(map(str, opts)))


def rate(cfg: CfgNode, iteration: int) -> float:
    """The learning rate of Detectron2's scheduler in an iteration."""
    scheduler = build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], cfg.SOLVER.BASE_LR))
    scheduler.last_epoch = iteration
    return scheduler.get_lr()[0]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda path: path.stem)
def test_section_4_1(leaf):
    """100 epochs; 0.1 for 256 images, divided by 10 at epochs 30, 60 and 90; decay 1e-4.

    VGG has the rate of its authors, 0.01.
    """
    cfg = resolve_config(config(leaf.stem), *IMAGENET)
    solver, keys = cfg.SOLVER, cfg.MODEL
    assert solver.IMS_PER_BATCH == 256 and solver.MAX_ITER == 500_456
    vgg = "VGG" in leaf.stem
    first = 0.01 if vgg else 0.1
    for epoch, before in ((30, first), (60, first / 10), (90, first / 100)):
        drop = round(epoch * 1_281_167 / 256)
        assert rate(cfg, drop - 1) == pytest.approx(before)
        assert rate(cfg, drop) == pytest.approx(before / 10)
    assert rate(cfg, 0) == pytest.approx(first), "no warm-up"
    assert rate(cfg, 500_455) == pytest.approx(first / 1000)
    assert (solver.MOMENTUM, solver.NESTEROV, solver.WEIGHT_DECAY) == (0.9, False, 1e-4)
    assert keys.ROI_HEADS.NUM_CLASSES == 1000 and cfg.PRETRAIN.IMAGE_SIZE == 224
    assert cfg.TEST.EVAL_PERIOD == solver.CHECKPOINT_PERIOD == 5005, "one epoch, 5004.6 iterations"
    # The shipped detection configs expect a backbone with these keys
    assert keys.PIXEL_STD == [1.0, 1.0, 1.0] and keys.PIXEL_MEAN == [103.53, 116.28, 123.675]
    assert cfg.INPUT.FORMAT == "BGR" and not keys.RESNETS.STRIDE_IN_1X1
    kind, section = ("VGG", keys.VGG) if vgg else ("R", keys.RESNETS)
    name = "_".join([kind, str(section.DEPTH), section.NORM.lower()]).rstrip("_")
    assert leaf.stem == name and cfg.OUTPUT_DIR == f"output/{name}"


@pytest.mark.parametrize(("batch", "expected"), [(512, 0.2), (64, 0.025), (2, 0.1 / 128)])
def test_the_rate_is_linear_in_the_batch(batch, expected):
    """The number of epochs is constant, and Detectron2 does not scale the config again."""
    cfg = resolve_config(config("R_50_bn", "SOLVER.IMS_PER_BATCH", batch), *IMAGENET)
    assert cfg.SOLVER.BASE_LR == pytest.approx(expected)
    assert cfg.SOLVER.MAX_ITER == round(100 * 1_281_167 / batch)
    assert DefaultTrainer.auto_scale_workers(cfg, 2).SOLVER == cfg.SOLVER
    assert DefaultTrainer.auto_scale_workers(config("R_50_bn"), 2).SOLVER.IMS_PER_BATCH == 256


def test_custom_periods():
    cfg = config("R_50_gn", "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 700)
    resolved = resolve_config(cfg, *IMAGENET)
    assert (resolved.TEST.EVAL_PERIOD, resolved.SOLVER.CHECKPOINT_PERIOD) == (0, 700)
    assert cfg.SOLVER.BASE_LR == 0.1 and cfg.is_frozen(), "the given config must not change"


def test_two_steps_in_the_same_iteration():
    epochs = ("PRETRAIN.EPOCHS", 2, "PRETRAIN.STEPS", "(0.9,1.1)")
    cfg = config("R_50_gn", "SOLVER.IMS_PER_BATCH", 100, *epochs)
    with pytest.raises(InputError, match=r"PRETRAIN.STEPS .* iterations \[1, 1\] of 2"):
        resolve_config(cfg, 100, 10)


@pytest.mark.parametrize("name", ["R_50_gn", "R_18_gn", "R_50_bn"])
def test_last_gamma_of_each_block_is_initialized_to_zero(name):
    """So each residual branch starts at 0; all other gammas start at 1."""
    model = build_model(config(name, "MODEL.DEVICE", "cpu"))
    last = "conv2" if "18" in name else "conv3"
    gammas = {n: p for n, p in model.named_parameters() if n.endswith("norm.weight")}
    zero = {n for n, gamma in gammas.items() if not gamma.any()}
    assert zero == {n for n in gammas if f".{last}.norm" in n}
    assert len(zero) == (8 if "18" in name else 16)
    assert all((gammas[n] == 1).all() for n in set(gammas) - zero)


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize(("frames", "clips"), [(32, 64), (64, 32)])
def test_section_4_3(norm, frames, clips):
    """The non-local baseline: 400,000 iterations of 64 clips, of 32 frames that are 2 apart."""
    cfg = read_config(f"Kinetics-Classification/I3D_R_50_{frames}_{norm}.yaml")
    cfg = resolve_config(cfg, 240_000, 400)
    solver, scale = cfg.SOLVER, 64 // clips
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (clips, 0.01 / scale)
    assert solver.MAX_ITER == pytest.approx(400_000 * scale, rel=0.005)
    assert solver.STEPS == (150_000 * scale, 300_000 * scale)
    assert solver.NESTEROV and (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (1e-4, 0.0)
    keys = cfg.PRETRAIN
    assert (keys.FRAMES, keys.FRAME_STRIDE, keys.DROPOUT) == (frames, 2, 0.5)
