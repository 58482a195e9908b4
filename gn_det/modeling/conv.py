"""Subclasses of Detectron2's `Conv2d`: with a residual after the norm, with standardized weight."""

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor

from ..layers import standardize_weight


class NormConv2d(Conv2d):
    """Detectron2's `Conv2d` whose norm can add a residual, as fused norms do.

    Parameters have the same names, shapes and values as in `Conv2d`.
    """

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution alone, without norm and activation."""
        weight = self.filters()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def filters(self) -> Tensor:
        """The weight of the convolution; subclasses may transform the parameter."""
        return self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.convolve(x)
        if self.norm is not None:
            x = self.norm(x) if residual is None else self.norm(x, residual)
        return x if self.activation is None else self.activation(x)


class StandardizedConv2d(NormConv2d):
    """`NormConv2d` that standardizes its weight in every forward pass (GN+WS)."""

    def filters(self) -> Tensor:
        return standardize_weight(self.weight)
