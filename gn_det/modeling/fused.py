"""Detectron2's blocks and heads with norm, residual and ReLU in one operator.

A stock layer becomes a fused one in three steps. Detectron2 builds it with BatchNorm, `swap_norm`
in `norm.py` replaces each BatchNorm by the norm that the config asks for, and `implement` below
gives the built layers a subclass as their `__class__`. The subclasses override `forward` and add no
state, so names, shapes and values of all tensors stay those of the stock layers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..layers import GroupNorm, GroupNormAct, frozen_bn_act, recompute_activations
from .conv import NormConv2d

IMPLEMENTATIONS = ("fused", "native")
RECOMPUTE = ("none", "norm", "conv3", "block")


class FrozenBNAct(FrozenBatchNorm2d):
    """Detectron2's FrozenBN that adds a residual and applies ReLU in the same operator.

    Attributes:
        relu: whether it ends with a ReLU.
    """

    relu = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        vectors = self.weight, self.bias, self.running_mean, self.running_var
        return frozen_bn_act(x, *vectors, self.eps, residual, self.relu)


class FusedStem(BasicStem):
    """Detectron2's stem."""

    recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        with recompute_activations(self.recompute != "none"):
            return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class FusedBasicBlock(BasicBlock):
    """Detectron2's block of ResNet-18 and 34."""

    recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        return _checkpoint(self.recompute == "block", self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        with recompute_activations(self.recompute in ("norm", "conv3")):
            shortcut = x if self.shortcut is None else self.shortcut(x)
            return self.conv2(self.conv1(x), shortcut)


class FusedBottleneckBlock(BottleneckBlock):
    """Detectron2's block of ResNet-50, 101 and 152."""

    recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        return _checkpoint(self.recompute == "block", self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        with recompute_activations(self.recompute in ("norm", "conv3")):
            shortcut = x if self.shortcut is None else self.shortcut(x)
            out = self.conv2.convolve(self.conv1(x))
            if self.recompute != "conv3":
                return self._expand(out, shortcut)
        return _checkpoint(True, self._expand, out, shortcut)

    def _expand(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """From what conv2 gives, which is a quarter of what conv3 does."""
        return self.conv3(self.conv2.norm(out), shortcut)


def _checkpoint(enabled: bool, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not enabled or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


_NORMS = {GroupNorm: GroupNormAct, FrozenBatchNorm2d: FrozenBNAct}
_BLOCKS = {BasicStem: FusedStem, BasicBlock: FusedBasicBlock, BottleneckBlock: FusedBottleneckBlock}


def implement(
    module: nn.Module, impl: str = "fused", recompute: str = "norm", channels_last: bool = False
) -> nn.Module:
    """Choose how `module` computes its norms; what it computes and its state stay the same.

    Args:
        module: a backbone, stages of one, or a head, built and frozen; changed in place.
        impl, recompute, channels_last: as `MODEL.GROUP_NORM.IMPL`, `MODEL.GROUP_NORM.RECOMPUTE` and
            `MODEL.CHANNELS_LAST`.

    Returns:
        `module` itself.
    """
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if impl == "fused":
        layers: list[Any] = [*module.modules()]
        for layer in layers:
            if type(layer) in _NORMS:
                layer.__class__ = _NORMS[type(layer)]
        for layer in layers:
            if type(layer) in _BLOCKS:
                _fuse_block(layer, recompute)
            elif isinstance(layer, Conv2d):
                _fuse_conv(layer)
            elif hasattr(layer, "conv_norm_relus"):
                layer.recompute = recompute
    return module


def implementation(cfg: CfgNode) -> dict[str, Any]:
    """The arguments of `implement` that a config asks for.

    Raises:
        InputError: for a name that there is not.
    """
    keys = cfg.MODEL.GROUP_NORM
    for key, names in (("IMPL", IMPLEMENTATIONS), ("RECOMPUTE", RECOMPUTE)):
        if keys[key] not in names:
            raise InputError(
                f"MODEL.GROUP_NORM.{key} {keys[key]}: it is none of {', '.join(names)}"
            )
    return {
        "impl": keys.IMPL,
        "recompute": keys.RECOMPUTE,
        "channels_last": cfg.MODEL.CHANNELS_LAST,
    }


def _fuse_block(block: Any, recompute: str) -> None:
    convs: list[Any] = [conv for conv in block.children() if isinstance(conv, Conv2d)]
    norms = [conv.norm for conv in convs]
    if not all(isinstance(norm, GroupNormAct | FrozenBNAct) for norm in norms):
        return
    for conv in convs:
        if type(conv) is Conv2d:
            conv.__class__ = NormConv2d
        # The shortcut's output is added to another
        conv.norm.relu = conv is not getattr(block, "shortcut", None)
    block.__class__ = _BLOCKS[type(block)]
    if isinstance(norms[0], GroupNormAct):
        block.recompute = recompute


def _fuse_conv(conv: Conv2d) -> None:
    if isinstance(conv.norm, GroupNormAct | FrozenBNAct) and isinstance(conv.activation, nn.ReLU):
        conv.norm.relu, conv.activation = True, None
