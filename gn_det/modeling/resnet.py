"""What the `RESNETS` keys add to a ResNet that Detectron2 has built."""

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d
from torch import nn

from .conv import StandardizedConv2d
from .norm import is_group_norm, swap_norm


def finish_resnet(stages: nn.Module, cfg: CfgNode, where: str) -> None:
    """Bring what Detectron2 built by `stock_config` to what `MODEL.RESNETS` asks for, in place.

    Args:
        stages: a ResNet, or single stages of one, not frozen yet.
        where: its name in the model, for error messages.

    Raises:
        InputError: if the groups do not divide the channels of a layer; it names the layer.
    """
    keys = cfg.MODEL.RESNETS
    if is_group_norm(keys.NORM):
        swap_norm(stages, cfg, keys.NORM, where)
    if keys.ZERO_INIT_RESIDUAL:
        _zero_last_gamma(stages)
    if keys.WEIGHT_STANDARDIZATION:
        _standardize_convs(stages)


def _zero_last_gamma(stages: nn.Module) -> None:
    """Let every residual block start as the identity (the paper's Section 4.1)."""
    for block in stages.modules():
        if isinstance(block, CNNBlockBase) and hasattr(block, "conv2"):
            norm = getattr(block, "conv3", block.conv2).norm
            # FrozenBN's gamma is no parameter: at 0 it could never leave it
            if norm is not None and isinstance(norm.weight, nn.Parameter):
                nn.init.zeros_(norm.weight)


def _standardize_convs(stages: nn.Module) -> None:
    """Make a `StandardizedConv2d` of every convolution that a norm follows."""
    for conv in stages.modules():
        # Deformable convolutions stay as they are, as in MMDetection's gn+ws
        if type(conv) is Conv2d and conv.norm is not None:
            # It adds no state, and a new layer would draw random weights that nobody needs
            conv.__class__ = StandardizedConv2d
