"""Frozen BatchNorm (BN*), the addition of a residual, and ReLU, as one operator."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from . import eager
from .dispatch import (
    aligned,
    cast_like,
    dense,
    has_kernel,
    is_exporting,
    is_plain,
    needs_gradient,
    on_device_of,
)

_LIBRARY = library.Library("gn_det", "FRAGMENT")
_LIBRARY.define(
    "frozen_bn_act(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
    "Tensor? residual, float eps, bool relu) -> Tensor"
)
_LIBRARY.define(
    "frozen_bn_act_backward(Tensor dy, Tensor? y, Tensor weight, Tensor variance, float eps, "
    "bool residual) -> (Tensor, Tensor)"
)


def frozen_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Compute relu((x - mean) / sqrt(variance + eps) * weight + bias + residual) in one operator.

    The ReLU and the residual are optional. With a ReLU, only y is saved for the backward pass;
    without it, no feature map is saved. The four vectors get no gradients, as in Detectron2's
    `FrozenBatchNorm2d`.

    Args:
        x: (N, C, *), contiguous or channels_last. N may be 0.
        weight, bias, mean, variance: (C,).
        eps: added to the variance.
        residual: a tensor of x's shape, added before the ReLU.
        relu: whether to apply a ReLU.

    Returns:
        a tensor of x's shape, dtype and memory format.

    Raises:
        ValueError: if a tensor is on another device than x.
    """
    if is_exporting():
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y
    for tensor in (weight, bias, mean, variance, residual):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, but another tensor is on {tensor.device}")
    x = dense(x)
    if residual is not None:
        residual = cast_like(residual, x)
    vectors = [vector.contiguous() for vector in (weight, bias, mean, variance)]
    arguments = (x, *vectors, residual, eps, relu)
    if not needs_gradient(x, residual):
        return _operator(x)(*arguments)
    return _FrozenBNAct.apply(*arguments)


def _operator(x: Tensor) -> Callable[..., Tensor]:
    return _forward if is_plain(x) else torch.ops.gn_det.frozen_bn_act


class _FrozenBNAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        residual: Tensor | None,
        eps: float,
        relu: bool,
    ) -> Tensor:
        y = _operator(x)(x, weight, bias, mean, variance, residual, eps, relu)
        ctx.save_for_backward(y if relu else None, weight, variance)
        ctx.eps, ctx.has_residual = eps, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        y, weight, variance = ctx.saved_tensors
        dy = dense(dy) if y is None else cast_like(dy, y)
        operator = _backward if is_plain(dy) else torch.ops.gn_det.frozen_bn_act_backward
        dx, dresidual = operator(dy, y, weight, variance, ctx.eps, ctx.has_residual)
        # Without a ReLU, dy itself is the residual's gradient, and the operator returns no copy
        dresidual = dy if y is None else dresidual
        return dx, None, None, None, None, dresidual if ctx.has_residual else None, None, None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    tensors = x, weight, bias, mean, variance, residual
    if not has_kernel(x):
        return eager.frozen_bn(*tensors, eps, relu)
    from .kernels import frozen_bn

    with on_device_of(x):
        x, weight, bias, mean, variance, residual = aligned(*tensors)
        return frozen_bn.forward(x, weight, bias, mean, variance, residual, eps, relu)


def _backward(
    dy: Tensor, y: Tensor | None, weight: Tensor, variance: Tensor, eps: float, residual: bool
) -> tuple[Tensor, Tensor]:
    if not has_kernel(dy):
        return eager.frozen_bn_backward(dy, y, weight, variance, eps, residual)
    from .kernels import frozen_bn

    with on_device_of(dy):
        dy, y, weight, variance = aligned(dy, y, weight, variance)
        return frozen_bn.backward(dy, y, weight, variance, eps, residual)


def _fake_backward(dy, y, weight, variance, eps, residual):  # type: ignore[no-untyped-def]
    dresidual = torch.empty_like(dy) if residual and y is not None else dy.new_empty(0)
    return torch.empty_like(dy), dresidual


# The fake functions give the shapes of the results to torch.compile
for _name, _function, _fake in (
    ("frozen_bn_act", _forward, lambda x, *_: torch.empty_like(x)),
    ("frozen_bn_act_backward", _backward, _fake_backward),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    library.register_fake(f"gn_det::{_name}", _fake, lib=_LIBRARY)
