"""The shipped configs against the settings of the paper, Detectron and Detectron2."""

import pytest
import torch
from conftest import ROOT
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import build_lr_scheduler

from gn_det.config_file import read_config

MSRA = "detectron2://ImageNetPretrained/MSRA/R-{}.pkl"
FAIR = "catalog://ImageNetPretrained/FAIR/R-{}-GN"
PAPER = "Detectron1-Comparisons/"
JITTER = "COCO-InstanceSegmentation/"
FROZEN, GN = ("FrozenBN", "", "", ""), ("GN", "GN", "GN", "GN")
SYNC = ("SyncBN", "SyncBN", "SyncBN", "SyncBN")


def config(name: str, *opts: object) -> CfgNode:
    return read_config(f"{name}.yaml", list(map(str, opts)))


# config: (norms of ResNet, FPN, box head and mask head; convs and fcs of the box head; weights)
ROWS = {
    # Table 4
    "mask_rcnn_R_50_C4_noaug_2x": (FROZEN, None, MSRA),
    "mask_rcnn_R_50_C4_noaug_2x_gn": (("GN", "", "", ""), None, FAIR),
    "mask_rcnn_R_50_C4_noaug_2x_ln": (("LN", "", "", ""), None, "R-50-LN.pth"),
    # Table 5
    "mask_rcnn_R_50_FPN_noaug_2x_4conv1fc": (FROZEN, (4, 1), MSRA),
    "mask_rcnn_R_50_FPN_noaug_2x_boxgn": (("FrozenBN", "", "GN", ""), (4, 1), MSRA),
    "mask_rcnn_R_50_FPN_noaug_2x_gn_plainmask": (("GN", "GN", "GN", ""), (4, 1), FAIR),
    "mask_rcnn_R_50_FPN_noaug_2x_boxbn": (("FrozenBN", "", "BN", ""), (4, 1), MSRA),
    "mask_rcnn_R_50_FPN_noaug_2x_bn": (("BN", "", "", ""), (4, 1), MSRA),
    # Table 6
    "mask_rcnn_R_50_FPN_noaug_2x": (FROZEN, (0, 2), MSRA),
    "mask_rcnn_R_50_FPN_noaug_2x_gn": (GN, (4, 1), FAIR),
    "mask_rcnn_R_50_FPN_noaug_3x_gn": (GN, (4, 1), FAIR),
    "mask_rcnn_R_101_FPN_noaug_2x": (FROZEN, (0, 2), MSRA),
    "mask_rcnn_R_101_FPN_noaug_2x_4conv1fc": (FROZEN, (4, 1), MSRA),
    "mask_rcnn_R_101_FPN_noaug_2x_gn": (GN, (4, 1), FAIR),
    "mask_rcnn_R_101_FPN_noaug_3x_gn": (GN, (4, 1), FAIR),
    # Table 7
    "scratch_mask_rcnn_R_50_FPN_noaug_3x_gn": (GN, (4, 1), ""),
    "scratch_mask_rcnn_R_101_FPN_noaug_3x_gn": (GN, (4, 1), ""),
    "scratch_mask_rcnn_R_50_FPN_noaug_3x_syncbn": (SYNC, (4, 1), ""),
    "scratch_mask_rcnn_R_50_FPN_noaug_6x_gn": (GN, (4, 1), ""),
    "scratch_mask_rcnn_R_101_FPN_noaug_6x_gn": (GN, (4, 1), ""),
    "scratch_mask_rcnn_R_50_FPN_noaug_6x_syncbn": (SYNC, (4, 1), ""),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_paper(name):
    norms, box_head, weights = ROWS[name]
    cfg = config(PAPER + name)
    keys = cfg.MODEL
    depth = 101 if "101" in name else 50
    parts = (keys.RESNETS, keys.FPN, keys.ROI_BOX_HEAD, keys.ROI_MASK_HEAD)
    assert tuple(part.NORM for part in parts) == norms
    assert (keys.RESNETS.DEPTH, keys.MASK_ON) == (depth, True)
    assert keys.WEIGHTS == weights.format(depth)
    if box_head:
        assert (keys.ROI_BOX_HEAD.NUM_CONV, keys.ROI_BOX_HEAD.NUM_FC) == box_head
        assert keys.ROI_MASK_HEAD.NUM_CONV == 4
    # MSRA's backbones have the stride in the 1x1 convolution, all others in the 3x3
    assert keys.RESNETS.STRIDE_IN_1X1 == (weights == MSRA)
    assert keys.BACKBONE.FREEZE_AT == (0 if name.startswith("scratch") else 2)
    assert keys.PIXEL_STD == [1.0, 1.0, 1.0] and cfg.INPUT.FORMAT == "BGR"
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,) and cfg.INPUT.MAX_SIZE_TRAIN == 1333


@pytest.mark.parametrize("name", ROWS)
def test_solver_is_detectrons(name):
    """The values of its 04_2018_gn_baselines, its 12_2017_baselines, and its default config."""
    solver = config(PAPER + name).SOLVER
    images, rate = (8, 0.01) if "C4" in name else (16, 0.02)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (images, rate)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.MOMENTUM) == (1e-4, 0.0, 0.9)
    assert (solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS) == (2.0, 0.0)
    assert solver.GAMMA == 0.1 and solver.REFERENCE_WORLD_SIZE == 8
    assert (solver.WARMUP_METHOD, solver.WARMUP_ITERS) == ("linear", 500)
    assert solver.WARMUP_FACTOR == pytest.approx(1 / 3, abs=1e-6)


SCHEDULED = sorted(
    f"{path.parent.name}/{path.stem}"
    for folder in (PAPER, JITTER)
    for path in (ROOT / "configs" / folder).glob("*.yaml")
)


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules(name):
    """kx has k times 90,000 iterations of 16 images, and drops 60,000 and 20,000 before the end."""
    (times,) = (int(word[0]) for word in name.split("_") if word in ("1x", "2x", "3x", "6x"))
    solver = config(name).SOLVER
    scale = 16 // solver.IMS_PER_BATCH
    end = 90_000 * times
    # 1x follows Detectron's own schedule, which does not drop 60,000 before the end
    drops = (60_000, 80_000) if times == 1 else (end - 60_000, end - 20_000)
    assert solver.MAX_ITER == scale * end
    assert solver.STEPS == tuple(scale * step for step in drops)
    scheduler = build_lr_scheduler(config(name), torch.optim.SGD([torch.zeros(1)], lr=1.0))
    for step, factor in ((solver.WARMUP_ITERS, 1), (solver.STEPS[0], 0.1), (solver.STEPS[1], 0.01)):
        scheduler.last_epoch = step
        assert scheduler.get_lr() == pytest.approx([factor])


def test_every_recipe_exists_with_and_without_scale_jitter():
    """Each COCO recipe has a twin without scale jitter in Detectron1-Comparisons."""
    noaug = {name.removeprefix(PAPER) for name in SCHEDULED if name.startswith(PAPER)}
    for name in SCHEDULED:
        jitters = config(name).INPUT.MIN_SIZE_TRAIN != (800,)
        assert jitters == ("noaug" not in name) == name.startswith(JITTER)
        if jitters and "syncbn" not in name and "VGG" not in name:
            words = (
                name.removeprefix(JITTER).replace("FPN_", "FPN_noaug_").replace("C4_", "C4_noaug_")
            )
            assert words in noaug


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("name", "images_per_gpu", "rate_per_gpu"),
    [("mask_rcnn_R_50_FPN_noaug_2x_gn", 2, 0.0025), ("mask_rcnn_R_50_C4_noaug_2x_gn", 1, 0.00125)],
)
def test_scaled_to_fewer_gpus(num_gpus, name, images_per_gpu, rate_per_gpu):
    """By Detectron2's linear scaling rule: the same epochs and images per GPU."""
    cfg = config(PAPER + name)
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_gpus).SOLVER
    slower = 8 // num_gpus
    assert scaled.IMS_PER_BATCH == images_per_gpu * num_gpus
    assert scaled.BASE_LR == pytest.approx(rate_per_gpu * num_gpus)
    assert scaled.MAX_ITER == slower * cfg.SOLVER.MAX_ITER
    assert scaled.STEPS == tuple(slower * step for step in cfg.SOLVER.STEPS)
    assert scaled.WARMUP_ITERS == slower * 500
    seen = scaled.MAX_ITER * scaled.IMS_PER_BATCH
    assert seen == cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH


def test_a_batch_size_set_by_hand_is_not_scaled():
    """Detectron2's own documentation trains on one GPU with IMS_PER_BATCH 2 and BASE_LR 0.0025."""
    by_hand = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.0025)
    cfg = config(JITTER + "mask_rcnn_R_50_FPN_2x_gn", *by_hand)
    scaled = DefaultTrainer.auto_scale_workers(cfg, 1).SOLVER
    assert (scaled.IMS_PER_BATCH, scaled.BASE_LR, scaled.MAX_ITER) == (2, 0.0025, 180_000)
    both = config(
        PAPER + "mask_rcnn_R_50_FPN_noaug_2x",
        "SOLVER.IMS_PER_BATCH",
        32,
        *("SOLVER.REFERENCE_WORLD_SIZE", 16),
    )
    assert DefaultTrainer.auto_scale_workers(both, 8).SOLVER.IMS_PER_BATCH == 16
