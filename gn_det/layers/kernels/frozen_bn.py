"""Frozen BatchNorm, residual and ReLU: one kernel for the forward and one for the backward pass."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, types_of
from .tile import ceil_div, divisible, offsets, relu_gradient, tiles


@triton.jit
def _scale(VARIANCE, WEIGHT, c, C, eps):
    variance = tl.load(VARIANCE + c, c < C, 1.0).to(tl.float32)
    return tl.load(WEIGHT + c, c < C, 0.0).to(tl.float32) / tl.sqrt(variance + eps)


@triton.jit(do_not_specialize=["HW"])
def _forward_kernel(
    X, RESIDUAL, Y, MEAN, VARIANCE, WEIGHT, BIAS, C, HW, eps,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) / sqrt(variance + eps) * weight + bias + residual)"""
    if ALIGNED:
        HW = HW // 8 * 8
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < HW)[:, None] & (c < C)[None, :]
    offset = tl.program_id(2).to(tl.int64) * C * HW + offsets(p, c, HW, C, CHANNELS_LAST)
    scale = _scale(VARIANCE, WEIGHT, c, C, eps)
    mean = tl.load(MEAN + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(BIAS + c, c < C, 0.0).to(tl.float32)
    x = tl.load(X + offset, inside, 0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        y += tl.load(RESIDUAL + offset, inside, 0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, tl.PropagateNan.ALL)
    tl.store(Y + offset, y.to(Y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["HW"])
def _backward_kernel(
    DY, Y, DX, DRESIDUAL, VARIANCE, WEIGHT, C, HW, eps,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of the residual, which is dy masked by the ReLU."""
    if ALIGNED:
        HW = HW // 8 * 8
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < HW)[:, None] & (c < C)[None, :]
    offset = tl.program_id(2).to(tl.int64) * C * HW + offsets(p, c, HW, C, CHANNELS_LAST)
    dy = tl.load(DY + offset, inside, 0.0).to(tl.float32)
    if RELU:
        dy = relu_gradient(dy, tl.load(Y + offset, inside, 0.0).to(tl.float32))
        if HAS_RESIDUAL:
            tl.store(DRESIDUAL + offset, dy.to(DRESIDUAL.dtype.element_ty), inside)
    dx = dy * _scale(VARIANCE, WEIGHT, c, C, eps)[None, :]
    tl.store(DX + offset, dx.to(DX.dtype.element_ty), inside)


@lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, types: tuple, last: bool, residual: bool, relu: bool, forward: bool
) -> Launch:
    n, c, h, w = shape
    tile = tiles(c, h * w, last)
    grid = ceil_div(h * w, tile["BLOCK_P"]), ceil_div(c, tile["BLOCK_C"]), n
    flags = {"HAS_RESIDUAL": residual, "RELU": relu}
    kernel = _forward_kernel if forward else _backward_kernel
    return Launch(kernel, grid, (types, divisible(c)), **flags, **tile)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor,
    residual: Tensor | None, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """Compute `frozen_bn_act`; arguments and result are those of `eager.frozen_bn`."""
    shape, y = x.shape, torch.empty_like(x)
    types = types_of(x, residual, mean, variance, weight, bias)
    plan = _plan(shape, types, not x.is_contiguous(), residual is not None, relu, True)
    plan(
        x, residual, y, mean, variance, weight, bias, shape[1], shape[2] * shape[3], eps
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, y: Tensor | None, weight: Tensor, variance: Tensor, eps: float, residual: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients; arguments and results are those of `eager.frozen_bn_backward`."""
    shape, dx = dy.shape, torch.empty_like(dy)
    dresidual = torch.empty_like(dy) if residual and y is not None else dy.new_empty(0)
    types = types_of(dy, y, variance, weight)
    plan = _plan(shape, types, not dy.is_contiguous(), residual, y is not None, False)
    plan(dy, y, dx, dresidual, variance, weight, shape[1], shape[2] * shape[3], eps)
    return dx, dresidual
