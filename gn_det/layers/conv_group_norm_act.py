"""A convolution and `group_norm_act`, of which only the convolution's input is saved."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import cast_like, dense, is_exporting, needs_gradient
from .group_norm_act import group_norm_act, operators

# Stride, padding and dilation of both dimensions, and the number of groups of a convolution
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


def conv_group_norm_act(
    x: Tensor,
    filters: Tensor,
    conv_bias: Tensor | None,
    geometry: Geometry,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Compute `group_norm_act` of a convolution, whose output the backward pass recomputes.

    The norm's statistics are saved, so only the convolution runs again. The gradients have the same
    bits as those of the two operators. Under autocast the convolution runs in its dtype.

    Args:
        x: (N, C_in, H_in, W_in).
        filters: (C, C_in / groups of the convolution, kernel height, kernel width).
        conv_bias: (C,), of the convolution.
        geometry: of the convolution.
        weight, bias, num_groups, eps, relu: as in `group_norm_act`.
        residual: of the output's shape, added before the ReLU.

    Returns:
        (N, C, H, W), as `group_norm_act`.

    Raises:
        ValueError, RuntimeError: as `group_norm_act`.
    """
    others = weight, bias, residual
    # Compilers choose themselves what to recompute
    plainly = is_exporting() or torch.compiler.is_compiling()
    if plainly or not needs_gradient(x, filters, conv_bias, *others):
        out = F.conv2d(x, filters, conv_bias, *geometry)
        return group_norm_act(out, weight, bias, num_groups, eps, residual, relu)
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        inputs = x, filters, conv_bias, *others
        return _ConvGroupNormAct.apply(*inputs, geometry, num_groups, eps, relu)
    dtype = torch.get_autocast_dtype(device)
    cast = (t if t is None else t.to(dtype) for t in (x, filters, conv_bias))
    with torch.autocast(device, enabled=False):
        return _ConvGroupNormAct.apply(*cast, *others, geometry, num_groups, eps, relu)


class _ConvGroupNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        filters: Tensor,
        conv_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        geometry: Geometry,
        groups: int,
        eps: float,
        relu: bool,
    ) -> Tensor:
        out = dense(F.conv2d(x, filters, conv_bias, *geometry))
        residual = residual if residual is None else cast_like(residual, out)
        y, mean, rstd = operators(out).forward(out, weight, bias, residual, groups, eps, relu)
        # Without a residual, the ReLU's mask can be computed from the convolution's output
        masks = y if relu and residual is not None else None
        ctx.save_for_backward(x, filters, conv_bias, weight, bias, mean, rstd, masks)
        ctx.constants, ctx.geometry = (groups, eps, relu), geometry
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError("conv_group_norm_act has no second derivative")
        *inputs, weight, bias, mean, rstd, y = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            leaves: list[Any] = [
                t if t is None else t.detach().requires_grad_(need)
                for t, need in zip(inputs, needed, strict=True)
            ]
            convolved = F.conv2d(*leaves, *ctx.geometry)
        out = dense(convolved.detach())
        dy, relu = cast_like(dy, out), ctx.constants[-1]
        dout, dweight, dbias, dresidual = operators(out).backward(
            dy, out, y, weight, bias, mean, rstd, *ctx.constants
        )
        gradients: list[Any] = [None] * 3
        if convolved.requires_grad:
            wanted = [i for i, need in enumerate(needed) if need]
            found = torch.autograd.grad(
                convolved, [leaves[i] for i in wanted], dout, allow_unused=True
            )
            for i, gradient in zip(wanted, found, strict=True):
                gradients[i] = gradient
        # Without a ReLU, dy itself is the residual's gradient
        added = (dresidual if relu else dy) if ctx.needs_input_grad[5] else None
        return *gradients, dweight, dbias, added, None, None, None, None
