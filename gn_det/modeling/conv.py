"""Detectron2's `Conv2d` with room for what is done to its weight and after its norm."""

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor

from ..layers import standardize_weight


class NormConv2d(Conv2d):
    """Detectron2's `Conv2d`, whose norm may add a residual.

    Names, shapes and values of the parameters are those of the plain layer.
    """

    def convolve(self, x: Tensor) -> Tensor:
        """What the norm gets."""
        weight = self.filters()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def filters(self) -> Tensor:
        """The weight that is convolved with."""
        return self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.convolve(x)
        if self.norm is not None:
            x = self.norm(x) if residual is None else self.norm(x, residual)
        return x if self.activation is None else self.activation(x)


class StandardizedConv2d(NormConv2d):
    """It convolves with its standardised weight."""

    def filters(self) -> Tensor:
        return standardize_weight(self.weight)
