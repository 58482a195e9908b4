"""Checks of single values that Detectron2 and PyTorch would refuse with a traceback."""

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import samplers
from detectron2.solver import build_lr_scheduler

from ..config import is_clips, is_pretraining, value_of
from .problem import Problem

# Key -> smallest and largest value
RANGES: dict[str, tuple[float, float]] = {
    **{
        f"MODEL.{key}": (1, 2**16)
        for key in (
            *("FPN.OUT_CHANNELS", "RESNETS.STEM_OUT_CHANNELS", "RESNETS.RES2_OUT_CHANNELS"),
            *("RESNETS.NUM_GROUPS", "RESNETS.WIDTH_PER_GROUP", "VGG.WIDTH"),
            *("ROI_BOX_HEAD.CONV_DIM", "ROI_BOX_HEAD.FC_DIM", "ROI_MASK_HEAD.CONV_DIM"),
            *("ROI_BOX_HEAD.POOLER_RESOLUTION", "ROI_MASK_HEAD.POOLER_RESOLUTION"),
            *("ROI_HEADS.BATCH_SIZE_PER_IMAGE", "RPN.BATCH_SIZE_PER_IMAGE"),
            "ROI_HEADS.NUM_CLASSES",
        )
    },
    **{
        f"MODEL.{key}": (0, 100)
        for key in ("ROI_BOX_HEAD.NUM_CONV", "ROI_BOX_HEAD.NUM_FC", "ROI_MASK_HEAD.NUM_CONV")
    },
    **{
        f"SOLVER.{key}": (0, 1e9)
        for key in (
            *("BASE_LR", "WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WARMUP_ITERS", "WARMUP_FACTOR"),
            *("BIAS_LR_FACTOR", "NORM_LR_FACTOR", "BACKBONE_MULTIPLIER", "MASK_HEAD_MULTIPLIER"),
            *("REFERENCE_WORLD_SIZE", "KEEP_CHECKPOINTS", "SKIP_BAD_BATCHES", "PATIENCE"),
        )
    },
    "MODEL.VGG.FC_DIM": (0, 2**16),
    **{f"PRETRAIN.{key}": (1, 2**16) for key in ("FRAMES", "FRAME_STRIDE", "TEST_CLIPS")},
    "PRETRAIN.DROPOUT": (0, 1),
    "TEST.DRAWN_IMAGES": (0, 1e9),
    **{
        f"MODEL.{key}": (0, 1)
        for key in (
            *("RPN.POSITIVE_FRACTION", "ROI_HEADS.POSITIVE_FRACTION", "RPN.NMS_THRESH"),
            *("ROI_HEADS.NMS_THRESH_TEST", "ROI_HEADS.SCORE_THRESH_TEST"),
            *("RETINANET.NMS_THRESH_TEST", "RETINANET.SCORE_THRESH_TEST"),
        )
    },
    **{
        f"MODEL.RPN.{when}_NMS_TOPK_{mode}": (1, 2**31)
        for when in ("PRE", "POST")
        for mode in ("TRAIN", "TEST")
    },
    "MODEL.BATCH_RENORM.R_MAX": (1, 1e9),
    "MODEL.BATCH_RENORM.D_MAX": (0, 1e9),
    "SOLVER.CHECKPOINT_PERIOD": (1, 2**40),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.MAX_ITER": (1, 2**40),
    "SOLVER.IMS_PER_BATCH": (1, 2**20),
    "SEED": (-(2**63), 2**32 - 1),
    "DATALOADER.NUM_WORKERS": (0, 2**10),
}
# "" is a head without a pooler, as PointRend's
POOLERS = ("", "ROIPool", "ROIAlign", "ROIAlignV2", "ROIAlignRotated")
# Detectron2 0.6 does not have the last two
BOX_LOSSES = (
    "smooth_l1",
    "giou",
    *(("diou", "ciou") if find_spec("detectron2.layers.losses") else ()),
)
CHOICES = {
    "SOLVER.WARMUP_METHOD": ("constant", "linear"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    # YUV is read as float64, which Detectron2's own models refuse
    "INPUT.FORMAT": ("BGR", "RGB", "L"),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    **{f"MODEL.ROI_{head}_HEAD.POOLER_TYPE": POOLERS for head in ("BOX", "MASK", "KEYPOINT")},
    **{
        f"MODEL.{part}.BBOX_REG_LOSS_TYPE": BOX_LOSSES
        for part in ("RPN", "ROI_BOX_HEAD", "RETINANET")
    },
}
NOT_EMPTY = (
    *("MODEL.RPN.IOU_THRESHOLDS", "MODEL.ROI_HEADS.IOU_THRESHOLDS"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"),
)
NAMES = ("MODEL.BACKBONE.NAME", "MODEL.DEVICE", "SOLVER.LR_SCHEDULER_NAME")


def check_values(cfg: CfgNode) -> Iterator[Problem]:
    """Check ranges, choices and lists of the keys that a model and its schedule need."""
    problems = [*_out_of_range(cfg), *_unknown(cfg)]
    problems = problems or [*_lists_that_do_not_fit(cfg)]
    yield from problems
    if not problems and not is_pretraining(cfg):
        yield from _check_scheduler(cfg)


def _out_of_range(cfg: CfgNode) -> Iterator[Problem]:
    for key, (low, high) in RANGES.items():
        value: Any = value_of(cfg, key)
        # Pretraining computes both from its epochs
        unused = is_pretraining(cfg) and key in ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD")
        if not unused and value is not None and not low <= value <= high:
            fix = f"set it to a value from {low:g} to {high:g}"
            yield Problem(key, value, "it is out of range", fix)
    steps = cfg.SOLVER.STEPS
    if not all(type(step) is int and step > 0 for step in steps):
        fix = 'give iterations above 0, such as "(60000,80000)"'
        yield Problem("SOLVER.STEPS", steps, "they are not iterations", fix)


def _unknown(cfg: CfgNode) -> Iterator[Problem]:
    for key, known in CHOICES.items():
        if (value := value_of(cfg, key)) not in known:
            yield Problem(key, value, "it is not known", f"set it to {' or '.join(known)}")
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    # Detectron2 0.6 has this sampler, but not the key of its ratio
    lacks_ratio = sampler == "RandomSubsetTrainingSampler"
    lacks_ratio = lacks_ratio and "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER
    if lacks_ratio or not hasattr(samplers, str(sampler)):
        reason = "this Detectron2 does not support it"
        yield Problem("DATALOADER.SAMPLER_TRAIN", sampler, reason, "set it to TrainingSampler")
    for key in NOT_EMPTY:
        if not value_of(cfg, key):
            yield Problem(key, value_of(cfg, key), "it is empty", "give at least one value")
    for key in NAMES:
        if not isinstance(value_of(cfg, key), str):
            yield Problem(key, value_of(cfg, key), "it is not a name", "set it to a name")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except (RuntimeError, TypeError):
        fix = "set it to cuda or cpu"
        yield Problem("MODEL.DEVICE", cfg.MODEL.DEVICE, "PyTorch knows no such device", fix)


def _lists_that_do_not_fit(cfg: CfgNode) -> Iterator[Problem]:
    """Check lists whose lengths and order depend on each other, or on the model."""
    keys = cfg.MODEL
    for part in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = keys[part].IOU_THRESHOLDS, keys[part].IOU_LABELS
        if list(thresholds) != sorted(thresholds):
            key = f"MODEL.{part}.IOU_THRESHOLDS"
            yield Problem(key, thresholds, "they do not increase", "sort them")
        if len(labels) != len(thresholds) + 1:
            reason = f"there are {len(thresholds)} thresholds, and so {len(thresholds) + 1} ranges"
            yield Problem(f"MODEL.{part}.IOU_LABELS", labels, reason, "give one label for each")
    for part in ("RPN", "ROI_BOX_HEAD", "RETINANET"):
        key, weights = f"MODEL.{part}.BBOX_REG_WEIGHTS", keys[part].BBOX_REG_WEIGHTS
        # Rotated boxes have an angle
        if len(weights) not in (4, 5) or not all(weight > 0 for weight in weights):
            yield Problem(key, weights, "they are not weights", "give four numbers above 0")
    if len(keys.PIXEL_STD) != len(keys.PIXEL_MEAN) or not all(std > 0 for std in keys.PIXEL_STD):
        reason = f"they are not standard deviations of {len(keys.PIXEL_MEAN)} channels"
        fix = "give a number above 0 for each of MODEL.PIXEL_MEAN"
        yield Problem("MODEL.PIXEL_STD", keys.PIXEL_STD, reason, fix)
    if is_clips(cfg) and not is_pretraining(cfg):
        reason, fix = "this backbone is for clips", "set MODEL.META_ARCHITECTURE ImageClassifier"
        yield Problem("MODEL.BACKBONE.NAME", keys.BACKBONE.NAME, reason, fix)
    strides, frames = keys.I3D.STEM_STRIDES, cfg.PRETRAIN.FRAMES
    if len(strides) != 2 or not all(type(stride) is int and stride > 0 for stride in strides):
        key, fix = "MODEL.I3D.STEM_STRIDES", 'give two strides, such as "(2,2)"'
        yield Problem(key, strides, "they are not two temporal strides", fix)
    elif is_clips(cfg) and frames < 2 * math.prod(strides):
        reason = f"MODEL.I3D.STEM_STRIDES {tuple(strides)} and a pooling leave no frame"
        fix = f"set it to at least {2 * math.prod(strides)}"
        yield Problem("PRETRAIN.FRAMES", frames, reason, fix)
    sampling, sizes = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.MIN_SIZE_TRAIN
    if sampling == "range" and len(sizes) != 2:
        key, fix = "INPUT.MIN_SIZE_TRAIN_SAMPLING", "give the smallest and the largest"
        yield Problem(key, sampling, f"INPUT.MIN_SIZE_TRAIN has {len(sizes)} sizes", fix)


def _check_scheduler(cfg: CfgNode) -> Iterator[Problem]:
    """Check that Detectron2 can build the schedule of the learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    # Steps that are out of order or beyond the end have a check of their own
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.STEPS = sorted({s for s in cfg.SOLVER.STEPS if s < cfg.SOLVER.MAX_ITER})
    try:
        build_lr_scheduler(cfg, optimizer)
    except (ValueError, TypeError, AssertionError) as error:
        key, name = "SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME
        yield Problem(key, name, f"Detectron2 refuses the schedule ({error})", "correct it")
