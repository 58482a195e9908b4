"""Subclasses of Detectron2's `Conv2d`: with a residual after the norm, with standardized weight."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor

from ..layers import conv_group_norm_act, standardize_weight


class NormConv2d(Conv2d):
    """Detectron2's `Conv2d` whose norm can add a residual, as fused norms do.

    Parameters have the same names, shapes and values as in `Conv2d`.

    Attributes:
        recompute: whether the backward pass recomputes the convolution, whose norm must be a
            `GroupNormAct`.
    """

    recompute = False

    def filters(self) -> Tensor:
        """The weight of the convolution; subclasses may transform the parameter."""
        return self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        filters, norm = self.filters(), self.norm
        geometry = self.stride, self.padding, self.dilation, self.groups
        if self.recompute and torch.is_grad_enabled():
            settings = norm.weight, norm.bias, norm.num_groups, norm.eps, residual, norm.relu
            x = conv_group_norm_act(x, filters, self.bias, geometry, *settings)
        else:
            x = F.conv2d(x, filters, self.bias, *geometry)
            if norm is not None:
                x = norm(x) if residual is None else norm(x, residual)
        return x if self.activation is None else self.activation(x)


class StandardizedConv2d(NormConv2d):
    """`NormConv2d` that standardizes its weight in every forward pass (GN+WS)."""

    def filters(self) -> Tensor:
        return standardize_weight(self.weight)
