"""The config keys that gn_det adds to Detectron2's."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode


def add_gn_config(cfg: CfgNode) -> None:
    """Add gn_det's keys to `cfg`, with the names that earlier code gave them where there are any.

    Call it between `get_cfg()` and `merge_from_file`. It changes no other key and no global
    default, so it composes with other plugins' `add_*_config`.
    """
    cfg.MODEL.GROUP_NORM = CfgNode()
    # Number of groups G, of every layer whose NORM is "GN"
    cfg.MODEL.GROUP_NORM.NUM_GROUPS = 32
    # Channels per group C/G, used instead of NUM_GROUPS unless -1
    cfg.MODEL.GROUP_NORM.DIM_PER_GP = -1
    # Number of groups in FPN and heads, where it is not to be as in the ResNet; -1 where it is
    cfg.MODEL.GROUP_NORM.HEADS_NUM_GROUPS = -1
    # Added to the variance, of every layer whose NORM is "GN", "LN" or "IN"
    cfg.MODEL.GROUP_NORM.EPSILON = 1e-5
    # "fused": norm, residual and ReLU in one operator, for GN and BN*; "native": PyTorch's own
    # operators, in Detectron2's own blocks
    cfg.MODEL.GROUP_NORM.IMPL = "fused"
    # What the fused GN computes again in the backward pass rather than keep: "none", "norm" (what a
    # norm with ReLU puts out), "conv3" (that, and each bottleneck's last convolution), "block"
    cfg.MODEL.GROUP_NORM.RECOMPUTE = "norm"

    # Whether backbone and heads compute in the channels_last memory format
    cfg.MODEL.CHANNELS_LAST = False

    # Gamma of the last norm in each residual block starts at 0, as in the paper's ImageNet training
    cfg.MODEL.RESNETS.ZERO_INIT_RESIDUAL = False
    # Standardise the weights of the ResNet's convolutions (GN+WS)
    cfg.MODEL.RESNETS.WEIGHT_STANDARDIZATION = False

    # Each training batch of IMS_PER_BATCH images goes through the model in so many parts, and their
    # gradients are added up: memory for one part, the step of the whole batch
    cfg.SOLVER.ACCUMULATE_ITERS = 1
    # Learning rate of gamma and beta, as a multiple of what it would be
    cfg.SOLVER.NORM_LR_FACTOR = 1.0
    # Learning rate of the ResNet, as a multiple of what it would be
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # What SOLVER.AMP.ENABLED computes in: "float16", as Detectron2 does, or "bfloat16"
    cfg.SOLVER.AMP.DTYPE = "float16"
    # How many of the checkpoints of a running training stay, the newest; 0 for all
    cfg.SOLVER.KEEP_CHECKPOINTS = 0
    # Batches with unreadable pictures, infinite numbers or NaN that a training passes over, with a
    # warning for each, before one stops it
    cfg.SOLVER.SKIP_BAD_BATCHES = 0

    cfg.PRETRAIN = CfgNode()
    # Passes over the training folder, and after how many of them the learning rate is divided by
    # 10 (SOLVER.GAMMA); SOLVER.MAX_ITER and SOLVER.STEPS follow from these
    cfg.PRETRAIN.EPOCHS = 100
    cfg.PRETRAIN.STEPS = (30, 60, 90)
    # The IMS_PER_BATCH that SOLVER.BASE_LR is meant for; at another it is scaled in proportion
    cfg.PRETRAIN.REFERENCE_BATCH_SIZE = 256
    # Side in pixels of the square pictures that the classifier sees
    cfg.PRETRAIN.IMAGE_SIZE = 224
    # Least share of a training picture's area that it may see of it
    cfg.PRETRAIN.MIN_CROP_AREA = 0.08


def is_pretraining(cfg: CfgNode) -> bool:
    """Whether a config is for `tools/pretrain_net.py`, that is, trains a classifier."""
    return cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"


def value_of(cfg: CfgNode, key: str) -> object:
    """The value of a key such as "MODEL.RESNETS.NORM"; a tuple comes as a list."""
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """A config's values by their full keys, as "MODEL.RESNETS.NORM"."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def as_opts(keys: Mapping[str, object]) -> list[str]:
    """Keys and values as `KEY VALUE` words of the command line."""
    return [str(word) for pair in keys.items() for word in pair]


def default_device() -> str:
    """The value of `MODEL.DEVICE` for tools that choose it: a GPU if PyTorch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
