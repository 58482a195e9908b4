"""Group Normalization, the addition of a residual, and ReLU, as one operator."""

from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from . import eager
from .dispatch import dense, has_kernel, is_exporting, like
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
    "group_norm_act_again(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
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
    """relu?(GN(x) * weight + bias + residual?), in one operator (Wu and He, ECCV 2018, Eq. 1 to 7).

    On NVIDIA GPUs it runs as Triton kernels, elsewhere as PyTorch's own. Statistics, scale, shift
    and the gradients of weight and bias are computed in float32 (float64 for float64 inputs) from
    centred values; the same inputs always give the same bits. Under autocast it stays in x's dtype,
    where PyTorch's group_norm on a GPU would go to float32.

    Args:
        x: (N, C, *), float32, bfloat16 or float16 (or float64, which no kernel covers), contiguous
            or channels_last. N may be 0.
        weight, bias: (C,), of x's dtype or float32.
        num_groups: G, a divisor of C.
        eps: added to each group's variance.
        residual: of x's shape, added before the ReLU.
        relu: whether negative values are cut off.

    Returns:
        a tensor of x's shape, dtype and memory format.

    Raises:
        ValueError: for shapes that do not fit.
        RuntimeError: if a second derivative is asked for.
    """
    if is_exporting():
        y = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y
    _check(x, weight, bias, num_groups, residual)
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    if residual is not None:
        residual = like(residual, x)
    if not torch.is_grad_enabled():
        return torch.ops.gn_det.group_norm_act(x, weight, bias, residual, num_groups, eps, relu)[0]
    return _GroupNormAct.apply(x, weight, bias, residual, num_groups, eps, relu)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, residual: Tensor | None
) -> None:
    channels = x.shape[1] if x.dim() > 1 else 0
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(f"{channels} channels do not divide into {num_groups} groups")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (channels,):
            raise ValueError(f"{name} is of shape {tuple(vector.shape)}, not ({channels},)")
    if residual is not None and residual.shape != x.shape:
        shapes = f"{tuple(residual.shape)}, not {tuple(x.shape)} as x"
        raise ValueError(f"residual is of shape {shapes}")


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
        y, mean, rstd = torch.ops.gn_det.group_norm_act(
            x, weight, bias, residual, groups, eps, relu
        )
        ctx.recomputation = None
        # What is compiled keeps what the compiler thinks best
        eagerly = not torch.compiler.is_compiling()
        if eagerly and is_recomputing() and residual is None:
            inputs = [t.detach() for t in (x, weight, bias, mean, rstd)]
            again = partial(torch.ops.gn_det.group_norm_act_again, *inputs, groups, eps, relu)
            ctx.recomputation = Recomputation(again)
        # The kernels know from x what passes the ReLU, unless something was added
        knows_from_x = ctx.recomputation is not None or (eagerly and has_kernel(x))
        needs_y = relu and (residual is not None or not knows_from_x)
        ctx.save_for_backward(x, y if needs_y else None, weight, bias, mean, rstd)
        ctx.constants = groups, eps, relu
        ctx.has_residual = residual is not None
        if ctx.recomputation is not None:
            attach(y, ctx.recomputation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "group_norm_act has no second derivative: use torch.nn.functional.group_norm"
            )
        x, y, *others = ctx.saved_tensors
        if ctx.recomputation is not None:
            # Where the next operation's gradient has just had it again
            latest = ctx.recomputation.take()
            y = None if has_kernel(x) else latest
        dx, dweight, dbias, passed = torch.ops.gn_det.group_norm_act_backward(
            like(dy, x), x, y, *others, *ctx.constants
        )
        # Without ReLU nothing is kept back, and no copy was made
        dresidual = passed if ctx.constants[-1] else dy
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
    with torch.cuda.device_of(x):
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
    with torch.cuda.device_of(x):
        return _kernels_for(x, groups).backward(dy, x, y, weight, bias, mean, rstd, groups, relu)


def _again(
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
    with torch.cuda.device_of(x):
        found = _kernels_for(x, groups)
        return found.normalise(x, mean, rstd, weight, bias, groups, eps, relu)


def _kernels_for(x: Tensor, groups: int) -> ModuleType:
    from .kernels import split, whole

    return whole if whole.fits(x, groups) else split


def _fake_forward(x, weight, bias, residual, groups, eps, relu):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=dtype) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _fake_backward(dy, x, y, weight, bias, *constants):  # type: ignore[no-untyped-def]
    passed = torch.empty_like(x) if constants[-1] and y is not None else x.new_empty(0)
    return *(torch.empty_like(tensor) for tensor in (x, weight, bias)), passed


for _name, _function, _fake in (
    ("group_norm_act", _forward, _fake_forward),
    ("group_norm_act_backward", _backward, _fake_backward),
    ("group_norm_act_again", _again, lambda x, *_: torch.empty_like(x)),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    library.register_fake(f"gn_det::{_name}", _fake, lib=_LIBRARY)
