"""Kernels that process whole groups in one program, for RoIs and small feature maps.

The forward and the backward pass take one launch each. A tile holds all positions (padded to
BLOCK_P) of GROUPS groups of D channels (padded to BLOCK_D), and stays in registers. BLOCK_P is a
power of two, so that one kernel is compiled per power of two and not per feature map size.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, types_of
from .tile import ceil_div, divisible, power_of_2, relu_gradient

# Number of elements that a program keeps in registers without spilling
LARGEST_TILE = 4096
# In channels_last, groups are adjacent in memory: a program takes several, up to this number of
# channels, so that its loads are long
CHANNELS = 64


@triton.jit
def _tile(
    C, HW, G, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Indices and masks of this program's tile.

    Returns:
        groups (GROUPS,); channels (GROUPS, BLOCK_D) and their mask; offsets of all elements
        (BLOCK_P, GROUPS, BLOCK_D) and their mask.
    """
    n = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)[:, None, None]
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = tl.arange(0, BLOCK_D)
    c = g[:, None] * D + d[None, :]
    valid = (g < G)[:, None] & (d < D)[None, :]
    if CHANNELS_LAST:
        offset = p * C + c[None, :, :]
    else:
        offset = c[None, :, :] * HW + p
    return g, c, valid, n.to(tl.int64) * C * HW + offset, valid[None, :, :] & (p < HW)


@triton.jit
def _mean(x, size):
    """Mean over positions and channels, (GROUPS,), of a tile that is 0 outside the mask."""
    return tl.sum(tl.sum(x, 0), 1) / size


@triton.jit(do_not_specialize=["HW", "G"])
def _forward_kernel(
    X, RESIDUAL, Y, MEAN, RSTD, WEIGHT, BIAS, C, HW, G, eps,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) * rstd * weight + bias + residual), and mean and rstd, both (N, G)."""
    g, c, valid, offset, inside = _tile(C, HW, G, CHANNELS_LAST, BLOCK_P, GROUPS, D, BLOCK_D)
    size = 1.0 * D * HW
    x = tl.load(X + offset, inside, 0.0).to(tl.float32)
    mean = _mean(x, size)
    centered = tl.where(inside, x - mean[None, :, None], 0.0)
    rstd = 1.0 / tl.sqrt(_mean(centered * centered, size) + eps)
    scale = rstd[:, None] * tl.load(WEIGHT + c, valid, 0.0).to(tl.float32)
    bias = tl.load(BIAS + c, valid, 0.0).to(tl.float32)
    y = centered * scale[None, :, :] + bias[None, :, :]
    if HAS_RESIDUAL:
        y += tl.load(RESIDUAL + offset, inside, 0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, tl.PropagateNan.ALL)
    tl.store(Y + offset, y.to(Y.dtype.element_ty), inside)
    slot = tl.program_id(0) * G + g
    tl.store(MEAN + slot, mean, g < G)
    tl.store(RSTD + slot, rstd, g < G)


@triton.jit(do_not_specialize=["HW", "G"])
def _backward_kernel(
    DY, X, Y, DX, DRESIDUAL, MEAN, RSTD, WEIGHT, BIAS, SUMS, DOTS, C, HW, G,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of x and the residual, and each image's gradients of bias and weight, (N, C)."""
    g, c, valid, offset, inside = _tile(C, HW, G, CHANNELS_LAST, BLOCK_P, GROUPS, D, BLOCK_D)
    n = tl.program_id(0)
    size = 1.0 * D * HW
    mean = tl.load(MEAN + n * G + g, g < G, 0.0)
    rstd = tl.load(RSTD + n * G + g, g < G, 0.0)
    weight = tl.load(WEIGHT + c, valid, 0.0).to(tl.float32)
    dy = tl.load(DY + offset, inside, 0.0).to(tl.float32)
    x = tl.load(X + offset, inside, 0.0).to(tl.float32)
    centered = tl.where(inside, x - mean[None, :, None], 0.0)
    if RELU and HAS_RESIDUAL:
        dy = relu_gradient(dy, tl.load(Y + offset, inside, 0.0).to(tl.float32))
        tl.store(DRESIDUAL + offset, dy.to(DRESIDUAL.dtype.element_ty), inside)
    elif RELU:
        bias = tl.load(BIAS + c, valid, 0.0).to(tl.float32)
        dy = relu_gradient(dy, centered * (rstd[:, None] * weight)[None, :, :] + bias[None, :, :])
    normalized = centered * rstd[None, :, None]
    tl.store(SUMS + n * C + c, tl.sum(dy, 0), valid)
    tl.store(DOTS + n * C + c, tl.sum(dy * normalized, 0), valid)
    dy *= weight[None, :, :]
    shift = _mean(dy, size)
    slope = _mean(dy * normalized, size)
    dx = rstd[None, :, None] * (dy - shift[None, :, None] - normalized * slope[None, :, None])
    tl.store(DX + offset, dx.to(DX.dtype.element_ty), inside)


def _tile_shape(shape: torch.Size, last: bool, groups: int) -> dict[str, int]:
    """Constants of the kernels."""
    channels = shape[1] // groups
    width = power_of_2(channels)
    positions = power_of_2(shape[2] * shape[3])
    adjacent = 1
    while last and adjacent < groups and adjacent * width < CHANNELS:
        if 2 * adjacent * width * positions > LARGEST_TILE:
            break
        adjacent *= 2
    return {"BLOCK_P": positions, "GROUPS": adjacent, "D": channels, "BLOCK_D": width}


@lru_cache(maxsize=4096)
def fits(shape: torch.Size, last: bool, groups: int) -> bool:
    """Whether a group of a tensor is small enough for a single program.

    Args:
        shape: (N, C, H, W).
        last: whether the memory format is channels_last.
        groups: number of groups.
    """
    tile = _tile_shape(shape, last, groups)
    return tile["BLOCK_P"] * tile["GROUPS"] * tile["BLOCK_D"] <= LARGEST_TILE


@lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, types: tuple, last: bool, groups: int,
    residual: bool, relu: bool, forward: bool,
) -> Launch:  # fmt: skip
    tile = _tile_shape(shape, last, groups)
    grid = shape[0], ceil_div(groups, tile["GROUPS"]), 1
    # One warp for each 256 elements, which is 8 for each thread
    warps = max(1, min(16, tile["BLOCK_P"] * tile["GROUPS"] * tile["BLOCK_D"] // 256))
    flags = {"HAS_RESIDUAL": residual, "RELU": relu, "CHANNELS_LAST": last}
    kernel = _forward_kernel if forward else _backward_kernel
    return Launch(kernel, grid, (types, divisible(shape[1])), warps, **flags, **tile)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    residual: Tensor | None, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute `group_norm_act`; arguments and results are those of `eager.group_norm`."""
    n, c, h, w = shape = x.shape
    types = types_of(x, residual, weight, bias)
    plan = _plan(shape, types, not x.is_contiguous(), groups, residual is not None, relu, True)
    y = torch.empty_like(x)
    mean = x.new_empty((n, groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    plan(x, residual, y, mean, rstd, weight, bias, c, h * w, groups, eps)
    return y, mean, rstd


def normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    groups: int, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """Recompute y as `split.normalize`; statistics cost nothing once the group is in registers."""
    return forward(x, weight, bias, groups, eps, None, relu)[0]


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor,
    mean: Tensor, rstd: Tensor, groups: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients; arguments and results are those of `split.backward`."""
    n, c, h, w = shape = x.shape
    types = types_of(x, y, weight, bias)
    plan = _plan(shape, types, not x.is_contiguous(), groups, y is not None, relu, False)
    dx = torch.empty_like(x)
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    shares = x.new_empty((2, n, c), dtype=torch.float32)
    plan(
        dy, x, y, dx, dresidual, mean, rstd, weight, bias, shares[0], shares[1], c, h * w, groups
    )  # fmt: skip
    totals = shares.sum(1)
    return dx, totals[1].to(weight.dtype), totals[0].to(bias.dtype), dresidual
