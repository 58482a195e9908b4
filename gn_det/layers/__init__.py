"""Normalization layers that depend only on PyTorch, not on Detectron2 or its configs."""

from .batch_renorm import BatchRenorm2d
from .conv_group_norm_act import conv_group_norm_act
from .frozen_bn_act import frozen_bn_act
from .group_norm import GroupNorm, GroupNormAct
from .group_norm_act import group_norm_act
from .recompute import recompute_activations
from .weight_standardization import standardize_weight

__all__ = [
    "BatchRenorm2d",
    "GroupNorm",
    "GroupNormAct",
    "conv_group_norm_act",
    "frozen_bn_act",
    "group_norm_act",
    "recompute_activations",
    "standardize_weight",
]
