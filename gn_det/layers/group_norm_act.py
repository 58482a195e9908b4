"""Group Normalization, the addition of a residual, and ReLU, as one operator."""

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

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
from .recompute import Recomputation, attach, is_recomputing

_LIBRARY = library.Library("gn_det", "FRAGMENT")
_LIBRARY.define(
    "group_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int groups, float eps, "
    "bool relu) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "group_norm_act_backward(Tensor dy, Tensor x, Tensor? y, Tensor weight, Tensor bias, "
    "Tensor mean, Tensor rstd, int groups, float eps, bool relu) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "group_norm_act_recompute(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "int groups, float eps, bool relu) -> Tensor"
)


def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Compute relu(GN(x) * weight + bias + residual) in one operator.

    GN is Group Normalization (Wu and He, ECCV 2018, Eq. 1 to 7); the ReLU and the residual are
    optional. It runs Triton kernels on NVIDIA GPUs, else PyTorch's native ones; see `dispatch`.

    Statistics, scale, shift and the gradients of weight and bias are computed in float32 (float64
    for float64 inputs), from centered values. The same inputs always give the same bits. Under
    autocast the result keeps x's dtype; PyTorch's group_norm on a GPU would cast to float32.

    Args:
        x: (N, C, *), float32, bfloat16 or float16 (or float64, without a Triton kernel), contiguous
            or channels_last. N may be 0.
        weight, bias: (C,), of x's dtype or float32.
        num_groups: number of groups G, a divisor of C.
        eps: added to each group's variance.
        residual: a tensor of x's shape, added before the ReLU.
        relu: whether to apply a ReLU.

    Returns:
        a tensor of x's shape, dtype and memory format.

    Raises:
        ValueError: if shapes or devices do not match.
        RuntimeError: in the backward pass, if a second derivative is requested.
    """
    if is_exporting():
        y = _exportable_group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y
    _check(x, weight, bias, num_groups, residual)
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    if residual is not None:
        residual = cast_like(residual, x)
    if not needs_gradient(x, weight, bias, residual):
        return operators(x).forward(x, weight, bias, residual, num_groups, eps, relu)[0]
    return _GroupNormAct.apply(x, weight, bias, residual, num_groups, eps, relu)


def _exportable_group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Group Normalization in PyTorch's own operators, also for N = 0."""
    if not torch.onnx.is_in_onnx_export():
        return F.group_norm(x, num_groups, weight, bias, eps)
    # The reshaping in PyTorch's translation of group_norm fails for N = 0
    grouped = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, *x.shape[2:])
    over = list(range(2, grouped.dim()))
    centered = grouped - grouped.mean(over, keepdim=True)
    variance = centered.square().mean(over, keepdim=True)
    normalized = (centered * torch.rsqrt(variance + eps)).reshape(x.shape)
    channels = (-1, *[1] * (x.dim() - 2))
    return normalized * weight.reshape(channels) + bias.reshape(channels)


def _recompute_with(
    operator: Callable[..., Tensor], groups: int, eps: float, relu: bool, *inputs: Tensor
) -> Tensor:
    return operator(*inputs, groups, eps, relu)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, residual: Tensor | None
) -> None:
    channels = x.shape[1] if x.dim() > 1 else 0
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(f"{channels} channels do not divide into {num_groups} groups")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (channels,):
            shape = tuple(vector.shape)
            raise ValueError(f"{name} has shape {shape}, but must have shape ({channels},)")
        if vector.device != x.device:
            raise ValueError(f"{name} is on {vector.device}, but x is on {x.device}")
    if residual is not None and residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, but x is on {x.device}")
    if residual is not None and residual.shape != x.shape:
        shapes = f"{tuple(residual.shape)}, but x has shape {tuple(x.shape)}"
        raise ValueError(f"residual has shape {shapes}")


class Operators(NamedTuple):
    """The forward, backward and recomputing functions."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    recompute: Callable[..., Tensor]


def operators(x: Tensor) -> Operators:
    """PyTorch's operators for compilers and the like, else the functions behind them, faster."""
    return _DIRECT if is_plain(x) else _DISPATCHED


class _GroupNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        groups: int,
        eps: float,
        relu: bool,
    ) -> Tensor:
        operator = operators(x)
        y, mean, rstd = operator.forward(x, weight, bias, residual, groups, eps, relu)
        ctx.recomputation = None
        # Under torch.compile, the compiler itself chooses what to save and what to recompute
        eagerly = not torch.compiler.is_compiling()
        ctx.constants = groups, eps, relu
        ctx.has_residual = residual is not None
        if eagerly and is_recomputing() and residual is None:
            compute = partial(_recompute_with, operator.recompute, groups, eps, relu)
            # It saves the inputs, and y is not needed
            ctx.recomputation = Recomputation(compute, x, weight, bias, mean, rstd)
            attach(y, ctx.recomputation)
            return y
        # Without a residual, the backward pass can get the ReLU's mask from x instead of from y
        needs_y = relu and (residual is not None or not (eagerly and has_kernel(x)))
        ctx.save_for_backward(x, y if needs_y else None, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "group_norm_act has no second derivative; use torch.nn.functional.group_norm"
            )
        if ctx.recomputation is not None:
            x, *others = ctx.recomputation.inputs
            # The next operation's backward pass has usually just recomputed y; the kernels get
            # the ReLU's mask from x instead
            recomputed = ctx.recomputation.take()
            y = None if has_kernel(x) else recomputed
        else:
            x, y, *others = ctx.saved_tensors
        dx, dweight, dbias, dresidual = operators(x).backward(
            cast_like(dy, x), x, y, *others, *ctx.constants
        )
        # Without a ReLU, dy itself is the residual's gradient, and the operator returns no copy
        dresidual = dresidual if ctx.constants[-1] else dy
        return dx, dweight, dbias, dresidual if ctx.has_residual else None, None, None, None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_kernel(x):
        return eager.group_norm(x, weight, bias, residual, groups, eps, relu)
    x, weight, bias, residual = aligned(x, weight, bias, residual)
    with on_device_of(x):
        return _kernels_for(x, groups).forward(x, weight, bias, groups, eps, residual, relu)


def _backward(
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
    if not has_kernel(x):
        return eager.group_norm_backward(dy, x, y, weight, bias, mean, rstd, groups, eps, relu)
    dy, x, y, weight, bias = aligned(dy, x, y, weight, bias)
    with on_device_of(x):
        return _kernels_for(x, groups).backward(dy, x, y, weight, bias, mean, rstd, groups, relu)


def _recompute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    relu: bool,
) -> Tensor:
    if not has_kernel(x):
        return eager.group_norm(x, weight, bias, None, groups, eps, relu)[0]
    x, weight, bias = aligned(x, weight, bias)
    with on_device_of(x):
        kernels = _kernels_for(x, groups)
        return kernels.normalize(x, mean, rstd, weight, bias, groups, eps, relu)


def _kernels_for(x: Tensor, groups: int) -> ModuleType:
    """`whole` for groups that fit into one program, such as those of RoIs, else `split`."""
    split, whole = _kernel_modules()
    return whole if whole.fits(x.shape, not x.is_contiguous(), groups) else split


@cache
def _kernel_modules() -> tuple[ModuleType, ModuleType]:
    from .kernels import split, whole

    return split, whole


def _fake_forward(x, weight, bias, residual, groups, eps, relu):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=dtype) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _fake_backward(dy, x, y, weight, bias, *constants):  # type: ignore[no-untyped-def]
    dresidual = torch.empty_like(x) if constants[-1] and y is not None else x.new_empty(0)
    return *(torch.empty_like(tensor) for tensor in (x, weight, bias)), dresidual


# The fake functions give the shapes of the results to torch.compile
for _name, _function, _fake in (
    ("group_norm_act", _forward, _fake_forward),
    ("group_norm_act_backward", _backward, _fake_backward),
    ("group_norm_act_recompute", _recompute, lambda x, *_: torch.empty_like(x)),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    library.register_fake(f"gn_det::{_name}", _fake, lib=_LIBRARY)

_DIRECT = Operators(_forward, _backward, _recompute)
_DISPATCHED = Operators(
    torch.ops.gn_det.group_norm_act,
    torch.ops.gn_det.group_norm_act_backward,
    torch.ops.gn_det.group_norm_act_recompute,
)
