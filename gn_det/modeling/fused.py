"""Detectron2's blocks and heads with norm, residual and ReLU fused into one operator.

A stock layer becomes a fused one in three steps:

1. Detectron2 builds the ResNet, the FPN or C4's res5 from `stock_config`, with "BN" instead of
   "GN". Box and mask heads and LazyConfigs start at step 3: they build with `GroupNorm` directly.
2. `swap_norm` in `norm.py` replaces each `BatchNorm2d` by a `GroupNorm`; FrozenBN stays as it is.
   Then the first stages of the backbone are frozen.
3. `implement` below changes the `__class__` of the built layers to a subclass:

   - `GroupNorm` becomes `GroupNormAct`, and `FrozenBatchNorm2d` becomes `FrozenBNAct`. Both can
     add a residual and apply a ReLU (attribute `relu`).
   - `BasicStem`, `BasicBlock` and `BottleneckBlock` become `FusedStem`, `FusedBasicBlock` and
     `FusedBottleneckBlock`, if all their norms are of these two types. Their `Conv2d`s become
     `NormConv2d`, which hands a residual to its norm. All their norms apply the ReLU, except the
     shortcut's. The last norm also adds the shortcut.
   - In other `Conv2d`s, such as those of the heads, an `nn.ReLU` activation moves into the norm.

   Layers with other norms, such as BatchNorm, keep their class.

The subclasses override `forward` and add no state, so names, shapes and values of all tensors
remain those of the stock layers. With `IMPL` "native", `implement` leaves all classes unchanged.
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
    """Detectron2's FrozenBN that also adds a residual and applies a ReLU, in one operator.

    Attributes:
        relu: whether to apply the ReLU.
    """

    relu = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        vectors = self.weight, self.bias, self.running_mean, self.running_var
        return frozen_bn_act(x, *vectors, self.eps, residual, self.relu)


class FusedStem(BasicStem):
    """Detectron2's stem, whose norm applies the ReLU.

    Attributes:
        recompute: the value of `MODEL.GROUP_NORM.RECOMPUTE`; every value but "none" recomputes the
            norm.
    """

    recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        with recompute_activations(self.recompute != "none"):
            return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class FusedBasicBlock(BasicBlock):
    """Detectron2's residual block of ResNet-18 and 34, with fused norms.

    Attributes:
        recompute: the value of `MODEL.GROUP_NORM.RECOMPUTE`; "conv3" acts as "norm".
    """

    recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        return _checkpoint(self.recompute == "block", self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        with recompute_activations(self.recompute in ("norm", "conv3")):
            shortcut = x if self.shortcut is None else self.shortcut(x)
            return self.conv2(self.conv1(x), shortcut)


class FusedBottleneckBlock(BottleneckBlock):
    """Detectron2's residual block of ResNet-50, 101 and 152, with fused norms.

    Attributes:
        recompute: the value of `MODEL.GROUP_NORM.RECOMPUTE`.
    """

    recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        return _checkpoint(self.recompute == "block", self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        with recompute_activations(self.recompute in ("norm", "conv3")):
            shortcut = x if self.shortcut is None else self.shortcut(x)
            return self.conv3(self.conv2(self.conv1(x)), shortcut)


def _checkpoint(enabled: bool, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call the function; if enabled, save only its inputs and recompute it in the backward pass."""
    if not enabled or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


_NORMS = {GroupNorm: GroupNormAct, FrozenBatchNorm2d: FrozenBNAct}
_BLOCKS = {BasicStem: FusedStem, BasicBlock: FusedBasicBlock, BottleneckBlock: FusedBottleneckBlock}


def implement(
    module: nn.Module, impl: str = "fused", recompute: str = "norm", channels_last: bool = False
) -> nn.Module:
    """Set how `module` computes its norms. Its results and its state stay the same.

    Args:
        module: a backbone, stages of one, or a head, built and frozen; changed in place.
        impl: "fused" or "native", as `MODEL.GROUP_NORM.IMPL`.
        recompute: "none", "norm", "conv3" or "block", as `MODEL.GROUP_NORM.RECOMPUTE`. It has no
            effect with "native".
        channels_last: whether to use the channels_last memory format, as `MODEL.CHANNELS_LAST`.

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
        if recompute != "none":
            _recompute_fpn(module, outputs=recompute != "norm")
        for layer in layers:
            if type(layer) in _BLOCKS:
                _fuse_block(layer, recompute)
            elif isinstance(layer, Conv2d):
                _fuse_conv(layer)
            elif hasattr(layer, "recompute"):
                layer.recompute = recompute
    return module


def implement_args(cfg: CfgNode) -> dict[str, Any]:
    """Return the keyword arguments of `implement` that a config sets.

    Args:
        cfg: a config that `add_gn_config` was called on.

    Raises:
        InputError: if `MODEL.GROUP_NORM.IMPL` or `MODEL.GROUP_NORM.RECOMPUTE` has an unknown value.
    """
    keys = cfg.MODEL.GROUP_NORM
    for key, names in (("IMPL", IMPLEMENTATIONS), ("RECOMPUTE", RECOMPUTE)):
        if keys[key] not in names:
            full_key = f"MODEL.GROUP_NORM.{key}"
            fix = f"set it to one of {', '.join(names)}"
            raise InputError(f"{full_key} {keys[key]} is not supported", key=full_key, fix=fix)
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
        # The shortcut's output is added before the block's last ReLU
        conv.norm.relu = conv is not getattr(block, "shortcut", None)
    block.__class__ = _BLOCKS[type(block)]
    if isinstance(norms[0], GroupNormAct):
        block.recompute = recompute
        # Its input is saved anyway, by the block's first convolution
        if recompute in ("norm", "conv3") and getattr(block, "shortcut", None) is not None:
            block.shortcut.recompute = True
        if recompute == "conv3" and isinstance(block, FusedBottleneckBlock):
            block.conv3.recompute = True


def _recompute_fpn(module: nn.Module, outputs: bool) -> None:
    """Recompute the lateral convolutions of an FPN, whose inputs are saved anyway.

    Args:
        module: an FPN, or something else, which is not changed.
        outputs: whether to recompute the 3x3 convolutions of the outputs, too.
    """
    convs = [*getattr(module, "lateral_convs", ())]
    convs += getattr(module, "output_convs", ()) if outputs else ()
    for conv in convs:
        if type(conv) is Conv2d and isinstance(conv.norm, GroupNormAct):
            conv.__class__ = NormConv2d
            conv.recompute = True


def _fuse_conv(conv: Conv2d) -> None:
    if isinstance(conv.norm, GroupNormAct | FrozenBNAct) and isinstance(conv.activation, nn.ReLU):
        conv.norm.relu, conv.activation = True, None
