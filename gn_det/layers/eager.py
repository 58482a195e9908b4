"""The normalization operators by PyTorch's native kernels, where no Triton kernel applies.

They are also the reference for the Triton kernels. Group statistics are computed in float32, or
in float64 if an input is float64. Results have the input's dtype and memory format.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import cast_like

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
    """Compute `group_norm_act`.

    Args:
        x: (N, C, *), dense.
        weight, bias: (C,).
        residual: of x's shape, added before the ReLU.
        groups: number of groups.
        eps: added to each group's variance.
        relu: whether to apply a ReLU.

    Returns:
        y of x's shape and dtype, and each group's mean and 1 / standard deviation, both
        (N, groups).
    """
    wide, weight, bias = _widen(x, weight, bias)
    y, mean, rstd = torch.native_group_norm(_native(wide), weight, bias, *_sizes(x), groups, eps)
    return _add_and_relu(cast_like(y, wide), x, residual, relu), mean, rstd


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
    """Compute the gradients of `group_norm_act`.

    Args:
        dy: gradient of the output.
        x, weight, bias, groups, eps, relu: as in the forward pass.
        y: the saved output; if it is None and `relu` is set, it is recomputed without a residual.
        mean, rstd: (N, groups), from the forward pass.

    Returns:
        gradients of x, weight and bias, and the gradient of the residual. The last is dy masked by
        the ReLU, or empty unless both `relu` and `y` are given.
    """
    dresidual = x.new_empty(0)
    if relu and y is not None:
        dy = dresidual = aten.threshold_backward(dy, y, 0)
    elif relu:
        y = group_norm(x, weight, bias, None, groups, eps, relu)[0]
        dy = aten.threshold_backward(dy, y, 0)
    wide, wide_dy, wide_weight = _widen(x, dy, weight)
    if x.is_cpu and x.dim() == 4 and not x.is_contiguous():
        dx, dweight, dbias = _backward_channels_last(wide_dy, wide, mean, rstd, wide_weight, groups)
    else:
        output_mask = [True, True, True]
        dx, dweight, dbias = aten.native_group_norm_backward(
            *(_native(wide_dy), _native(wide), mean, rstd, wide_weight),
            *(*_sizes(x), groups, output_mask),
        )
    return cast_like(dx, x), dweight.to(weight.dtype), dbias.to(bias.dtype), dresidual


def _backward_channels_last(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias by elementwise operations and sums.

    PyTorch's own kernel takes 2 to 40 times as long in this format on a CPU.
    """
    count = x[0].numel() // groups
    shape = (len(x), groups, -1)  # of values for each image and channel
    products, sums = (dy * x).sum((2, 3)).view(shape), dy.sum((2, 3)).view(shape)
    mean, rstd, weight = mean[..., None], rstd[..., None], weight.view(1, groups, -1)
    centred = products - sums * mean
    of_x = -(weight * centred).sum(-1, keepdim=True) * rstd**3 / count
    offset = -of_x * mean - (weight * sums).sum(-1, keepdim=True) * rstd / count
    scale, of_x, offset = (
        value.expand(products.shape).reshape(len(x), -1, 1, 1)
        for value in (weight * rstd, of_x, offset)
    )
    dx = torch.addcmul(offset, dy, scale).addcmul_(x, of_x)
    return dx, (centred * rstd).sum(0).flatten(), sums.sum(0).flatten()


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
    """Compute `frozen_bn_act`; the arguments are the same."""
    y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
    return _add_and_relu(y, x, residual, relu)


def frozen_bn_backward(
    dy: Tensor, y: Tensor | None, weight: Tensor, variance: Tensor, eps: float, residual: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `frozen_bn_act`.

    Args:
        dy: gradient of the output.
        y: the saved output if a ReLU was applied, else None.
        weight, variance, eps: as in the forward pass.
        residual: whether a residual was added.

    Returns:
        gradients of x and of the residual. The last is dy masked by the ReLU, or empty unless both
        `y` and `residual` are given.
    """
    scale = (weight * (variance + eps).rsqrt()).to(dy.dtype)
    scale = scale.view(-1, *(1 for _ in dy.shape[2:]))
    if y is None:
        return dy * scale, dy.new_empty(0)
    dy = aten.threshold_backward(dy, y, 0)
    return (dy * scale, dy) if residual else (dy.mul_(scale), dy.new_empty(0))


def _add_and_relu(y: Tensor, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Add the residual and apply the ReLU, in place: y is new, and autograd has not saved it."""
    if residual is not None:
        y.add_(residual)
    if relu:
        y.relu_()
    return y.to(x.dtype)


def _widen(*tensors: Tensor) -> Sequence[Tensor]:
    """Cast to float64 if any of the tensors is float64, else to float32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _native(x: Tensor) -> Tensor:
    """Convert x for PyTorch's kernels, of which only the CPU's know channels_last."""
    return x if x.is_cpu else x.contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """N, C and the number of spatial positions, the sizes that PyTorch's kernels take."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()
