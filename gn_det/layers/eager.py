"""The normalisations by PyTorch's own kernels: the reference, for the CPU and all else.

Statistics are in float32 or wider, and results have the input's dtype and layout.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the groups' mean and 1 / standard deviation, both (N, groups)."""
    wide, weight, bias = _widen(x, weight, bias)
    y, mean, rstd = torch.native_group_norm(wide, weight, bias, *_sizes(x), groups, eps)
    return _finish(y, x, residual, relu), mean, rstd


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, and, with ReLU and `y`, dy as far as the ReLU lets it.

    Without `y`, what the ReLU put out is computed again; without either, the last is empty.
    """
    passed = x.new_empty(0)
    if relu and y is not None:
        dy = passed = aten.threshold_backward(dy, y, 0)
    elif relu:
        y = group_norm(x, weight, bias, None, groups, eps, relu)[0]
        dy = aten.threshold_backward(dy, y, 0)
    wide, wide_dy, wide_weight = _widen(x, dy, weight)
    every = [True, True, True]
    dx, dweight, dbias = aten.native_group_norm_backward(
        wide_dy, wide, mean, rstd, wide_weight, *_sizes(x), groups, every
    )
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype), passed


def frozen_bn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """The result of `frozen_bn_act`."""
    y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
    return _finish(y, x, residual, relu)


def frozen_bn_backward(
    dy: Tensor, y: Tensor | None, weight: Tensor, variance: Tensor, eps: float, residual: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x and, with `residual` and the `y` of a ReLU, of the residual, else empty."""
    scale = (weight * (variance + eps).rsqrt()).to(dy.dtype)
    scale = scale.view(-1, *(1 for _ in dy.shape[2:]))
    if y is None:
        return dy * scale, dy.new_empty(0)
    dy = aten.threshold_backward(dy, y, 0)
    return (dy * scale, dy) if residual else (dy.mul_(scale), dy.new_empty(0))


def _finish(y: Tensor, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Add and cut off in place: y is new, and nobody has saved it."""
    if residual is not None:
        y.add_(residual)
    if relu:
        y.relu_()
    return y.to(x.dtype)


def _widen(*tensors: Tensor) -> Sequence[Tensor]:
    """In the widest dtype of all, which is float32 at least."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """N, C and the number of positions, as PyTorch's kernels want them."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()
