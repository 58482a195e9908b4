"""I3D: a ResNet for clips, whose convolutions are inflated over time (the paper's Section 4.3).

The temporal kernels and strides are those of the baseline of "Non-local Neural Networks" (arXiv
1711.07971), which the paper uses.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from ..errors import InputError
from .conv import NormConv2d, StandardizedConv2d

# Frames that the stem's convolution, and the first one of the blocks chosen below, cover
STEM_FRAMES, BLOCK_FRAMES = 5, 3
# Stage -> whether the block with this index is inflated
INFLATED: Mapping[str, Callable[[int], bool]] = {
    "res2": lambda block: True,
    "res3": lambda block: block % 2 == 0,
    "res4": lambda block: block % 2 == 0,
    "res5": lambda block: block % 2 == 1,
}


class InflatedConv2d(NormConv2d):
    """A convolution over time, height and width, of feature maps (N, C, T, H, W)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        geometry: Any = self.stride, self.padding, self.dilation, self.groups
        x = F.conv3d(x, self.weight, self.bias, *geometry)
        if self.norm is not None:
            # Norms compute over (T, H, W), which T x H rows of W pixels have in any layout
            rows = [x.flatten(2, 3), *([] if residual is None else [residual.flatten(2, 3)])]
            x = self.norm(*rows).unflatten(2, x.shape[2:4])
        return x if self.activation is None else self.activation(x)


class InflatedStem(BasicStem):
    """The stem for clips; its temporal strides are those of the convolution and of the pooling."""

    pool = 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not getattr(self.conv1.norm, "relu", False):
            x = F.relu(x)
        return F.max_pool3d(x, (self.pool, 3, 3), (self.pool, 2, 2), (0, 1, 1))


class I3D(ResNet):
    """Detectron2's ResNet for clips of shape (N, 3, T, H, W), with a temporal pooling after res2.

    The outputs have shape (N, C, T', H', W'). The names of the parameters are those of the ResNet.
    """

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = {}
        x = self.stem(x)
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            x = stage(x)
            outputs[name] = x
            if name == "res2":
                x = F.max_pool3d(x, (2, 1, 1), (2, 1, 1))
        return {name: outputs[name] for name in self._out_features}


def inflate(resnet: Any, stem_strides: tuple[int, int]) -> I3D:
    """Turn a ResNet into an I3D, in place.

    Args:
        resnet: built and frozen, and passed to `implement`.
        stem_strides: temporal strides of the stem's convolution and pooling: (2, 2) for clips of
            32 or 64 frames, (1, 1) for 8 frames that are further apart.

    Raises:
        InputError: for blocks that have no form for clips.
    """
    if not isinstance(resnet.stem, BasicStem):
        raise InputError("only Detectron2's BasicStem can be inflated")
    _inflate_conv(resnet.stem.conv1, STEM_FRAMES, stem_strides[0])
    resnet.stem.__class__, resnet.stem.pool = InflatedStem, stem_strides[1]
    for name, stage in zip(resnet.stage_names, resnet.stages, strict=True):
        for index, block in enumerate(stage):
            if not isinstance(block, BasicBlock | BottleneckBlock):
                key, fix = "MODEL.RESNETS.DEFORM_ON_PER_STAGE", "set it to False for all stages"
                raise InputError(f"{type(block).__name__} cannot be inflated", key=key, fix=fix)
            for child, conv in block.named_children():
                first = child == "conv1" and INFLATED[name](index)
                _inflate_conv(conv, BLOCK_FRAMES if first else 1)
    resnet.__class__ = I3D
    return resnet


def _inflate_conv(conv: Any, frames: int, stride: int = 1) -> None:
    if conv.norm is None:
        key, fix = "MODEL.RESNETS.NORM", "set it to a norm of features, such as GN"
        raise InputError(
            "a backbone for clips needs a norm after each convolution", key=key, fix=fix
        )
    if isinstance(conv, StandardizedConv2d):
        key, fix = "MODEL.RESNETS.WEIGHT_STANDARDIZATION", "set it to False"
        raise InputError("a backbone for clips has no standardized weights", key=key, fix=fix)
    conv.__class__ = InflatedConv2d
    weight, trained = inflated(conv.weight.detach(), frames), conv.weight.requires_grad
    if frames > 1:
        # Without pretrained weights, all frames start at random
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    conv.weight = nn.Parameter(weight, requires_grad=trained)
    conv.kernel_size, conv.dilation = (frames, *conv.kernel_size), (1, *conv.dilation)
    conv.stride, conv.padding = (stride, *conv.stride), (frames // 2, *conv.padding)


def inflated(weight: Tensor, frames: int) -> Tensor:
    """Filters over time that compute the same on a clip without motion, also at its ends.

    The filters are those of the middle frame, and 0 in the others. The baseline of the paper
    divides them among the frames, which zero padding changes at the ends of a clip.

    Args:
        weight: (out, in, H, W).
        frames: T, an odd number.

    Returns:
        (out, in, T, H, W).
    """
    result = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    result[:, :, frames // 2] = weight
    return result


def inflate_weights(tensors: dict[str, Any], model: nn.Module) -> None:
    """Inflate the filters of a file where the model's have a temporal dimension, in place.

    Args:
        tensors: of a file, by name, with or without the prefix "backbone.".
        model: what they will be loaded into.
    """
    frames = {_own(n): t.shape[2] for n, t in model.state_dict().items() if t.dim() == 5}
    for name, tensor in tensors.items():
        if _own(name) in frames and isinstance(tensor, Tensor) and tensor.dim() == 4:
            tensors[name] = inflated(tensor, frames[_own(name)])


def _own(name: str) -> str:
    """The name of a backbone's tensor without prefixes."""
    return name.rpartition("backbone.")[2].removeprefix("bottom_up.")
