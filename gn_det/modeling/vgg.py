"""VGG (Simonyan and Zisserman, arXiv 1409.1556), as the paper's Section 4.1 compares norms on."""

from collections.abc import Sequence
from itertools import chain

import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import Backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from ..errors import InputError
from ..layers import recompute_activations
from .norm import Norm

# Depth -> number of convolutions in each stage
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
# Channels of each stage, as multiples of the first one's
WIDTHS = (1, 2, 4, 8, 8)
OUTPUTS = ("conv1", "conv2", "conv3", "conv4", "conv5", "pool5")


class VGG(Backbone):
    """The convolutions of VGG, each followed by its norm and ReLU.

    The outputs "conv1" to "conv5" are those of the last convolution of a stage, before its max
    pooling, at strides 1 to 16. "pool5" is that of the last pooling, at stride 32. Layers have
    their usual names, "conv1_1" to "conv5_3".

    Args:
        depth: 11, 13, 16 or 19.
        width: channels of the first stage, 64 in the paper.
        norm: as in `modeling.norm.get_norm`; with "" the convolutions have a bias.
        out_features: names of the outputs.

    Attributes:
        recompute: the value of `MODEL.GROUP_NORM.RECOMPUTE`; every value but "none" recomputes the
            norms in the backward pass.

    Raises:
        InputError: for another depth or output, or if the groups do not divide the channels.
    """

    recompute = "none"

    def __init__(
        self, depth: int = 16, width: int = 64, norm: Norm = "", out_features: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise _unknown("DEPTH", depth, STAGES)
        if not out_features or not {*out_features} <= {*OUTPUTS}:
            raise _unknown("OUT_FEATURES", list(out_features), OUTPUTS)
        self.stages: list[list[str]] = []
        channels = 3
        for stage, count in enumerate(STAGES[depth], start=1):
            self.stages.append([f"conv{stage}_{place}" for place in range(1, count + 1)])
            for name in self.stages[-1]:
                out = WIDTHS[stage - 1] * width
                conv = Conv2d(
                    *(channels, out, 3),
                    padding=1,
                    bias=norm == "",
                    norm=get_norm(norm, out),
                    activation=nn.ReLU(),
                )
                c2_msra_fill(conv)
                self.add_module(name, conv)
                channels = out
        self._out_features = list(out_features)
        strides = dict(zip(OUTPUTS, (1, 2, 4, 8, 16, 32), strict=True))
        widths = dict(zip(OUTPUTS, (*WIDTHS, WIDTHS[-1]), strict=True))
        self._out_feature_strides = {name: strides[name] for name in out_features}
        self._out_feature_channels = {name: widths[name] * width for name in out_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the output features.

        Args:
            x: (N, 3, H, W), normalised.

        Returns:
            name of the output -> feature map.
        """
        outputs = {}
        with recompute_activations(self.recompute != "none"):
            for stage, names in enumerate(self.stages, start=1):
                for name in names:
                    x = self.get_submodule(name)(x)
                outputs[f"conv{stage}"] = x
                if stage < len(self.stages) or "pool5" in self._out_features:
                    x = F.max_pool2d(x, 2)
        outputs["pool5"] = x
        return {name: outputs[name] for name in self._out_features}

    def freeze(self, freeze_at: int) -> "VGG":
        """Freeze the first `freeze_at` stages; their BatchNorm becomes FrozenBN.

        Fast R-CNN freezes 2.
        """
        for name in chain.from_iterable(self.stages[:freeze_at]):
            conv = self.get_submodule(name)
            for parameter in conv.parameters():
                parameter.requires_grad = False
            FrozenBatchNorm2d.convert_frozen_batchnorm(conv)
        return self


def _unknown(key: str, value: object, known: object) -> InputError:
    key = f"MODEL.VGG.{key}"
    choices = ", ".join(map(str, known))  # type: ignore[call-overload]
    return InputError(f"{key} {value} is not known", key=key, fix=f"use {choices}")
