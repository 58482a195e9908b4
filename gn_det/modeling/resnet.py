"""The `MODEL.RESNETS` keys that gn_det applies to a ResNet built by Detectron2."""

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d
from torch import nn

from .conv import StandardizedConv2d
from .norm import is_swapped, swap_norm
from .weight_norm import WeightNormConv2d


def apply_resnet_keys(stages: nn.Module, cfg: CfgNode, module_name: str) -> None:
    """Apply `NORM`, `ZERO_INIT_RESIDUAL` and `WEIGHT_STANDARDIZATION` of `MODEL.RESNETS`, in place.

    Args:
        stages: a ResNet, or some of its stages, built with `stock_config` and not yet frozen.
        cfg: a config that `add_gn_config` was called on.
        module_name: name of `stages` in the model, for error messages.

    Raises:
        InputError: if the groups do not divide the channels of a layer; it names the layer.
    """
    keys = cfg.MODEL.RESNETS
    if is_swapped(keys.NORM):
        swap_norm(stages, cfg, keys.NORM, module_name)
    if keys.ZERO_INIT_RESIDUAL:
        _zero_last_gamma(stages)
    if keys.WEIGHT_STANDARDIZATION:
        _standardize_convs(stages)


def _zero_last_gamma(stages: nn.Module) -> None:
    """Initialize the last gamma of every residual block to 0 (the paper's Section 4.1)."""
    for block in stages.modules():
        if isinstance(block, CNNBlockBase) and hasattr(block, "conv2"):
            conv = getattr(block, "conv3", block.conv2)
            norm = conv.norm
            if isinstance(conv, WeightNormConv2d):
                conv.scale = 0.0
            # FrozenBN's gamma is not trained: at 0 it would disable the branch for good
            if norm is not None and isinstance(norm.weight, nn.Parameter):
                nn.init.zeros_(norm.weight)


def _standardize_convs(stages: nn.Module) -> None:
    """Turn every convolution that a norm follows into a `StandardizedConv2d`."""
    for conv in stages.modules():
        # Deformable convolutions are left unchanged, as in MMDetection's gn+ws
        if type(conv) is Conv2d and conv.norm is not None:
            # The subclass adds no state; a new layer would draw random weights needlessly
            conv.__class__ = StandardizedConv2d
