"""Whole groups in one program, for RoIs and small feature maps: one launch each way.

A tile is BLOCK_P positions of GROUPS groups of D channels (BLOCK_D with the padding), and stays in
registers. A kernel is compiled for each power of two that the positions reach, and no other size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import let_through

# Elements that a program keeps in registers without spilling them
LARGEST_TILE = 4096
# channels_last lies group beside group: programs take so many channels, for long loads
CHANNELS = 64


@triton.jit
def _tile(
    C, HW, G, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Channels (GROUPS, BLOCK_D) of this program, offsets of all elements, and which there are."""
    n = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)[:, None, None]
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = tl.arange(0, BLOCK_D)
    c = g[:, None] * D + d[None, :]
    there = (g < G)[:, None] & (d < D)[None, :]
    if CHANNELS_LAST:
        offset = p * C + c[None, :, :]
    else:
        offset = c[None, :, :] * HW + p
    return g, c, there, n.to(tl.int64) * C * HW + offset, there[None, :, :] & (p < HW)


@triton.jit
def _mean(x, size):
    """Mean over positions and channels, (GROUPS,), of a tile that is 0 outside."""
    return tl.sum(tl.sum(x, 0), 1) / size


@triton.jit
def _forward_kernel(
    X, RESIDUAL, Y, MEAN, RSTD, WEIGHT, BIAS, C, HW, G, eps,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = relu?((x - mean) * rstd * weight + bias + residual?), and mean and rstd, both (N, G)"""
    g, c, there, offset, inside = _tile(C, HW, G, CHANNELS_LAST, BLOCK_P, GROUPS, D, BLOCK_D)
    size = 1.0 * D * HW
    x = tl.load(X + offset, inside, 0.0).to(tl.float32)
    mean = _mean(x, size)
    centred = tl.where(inside, x - mean[None, :, None], 0.0)
    rstd = 1.0 / tl.sqrt(_mean(centred * centred, size) + eps)
    scale = rstd[:, None] * tl.load(WEIGHT + c, there, 0.0).to(tl.float32)
    bias = tl.load(BIAS + c, there, 0.0).to(tl.float32)
    y = centred * scale[None, :, :] + bias[None, :, :]
    if HAS_RESIDUAL:
        y += tl.load(RESIDUAL + offset, inside, 0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, tl.PropagateNan.ALL)
    tl.store(Y + offset, y.to(Y.dtype.element_ty), inside)
    slot = tl.program_id(0) * G + g
    tl.store(MEAN + slot, mean, g < G)
    tl.store(RSTD + slot, rstd, g < G)


@triton.jit
def _backward_kernel(
    DY, X, Y, DX, DRESIDUAL, MEAN, RSTD, WEIGHT, BIAS, SUMS, DOTS, C, HW, G,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx, dresidual, and each image's share of the gradients of bias and weight, both (N, C)."""
    g, c, there, offset, inside = _tile(C, HW, G, CHANNELS_LAST, BLOCK_P, GROUPS, D, BLOCK_D)
    n = tl.program_id(0)
    size = 1.0 * D * HW
    mean = tl.load(MEAN + n * G + g, g < G, 0.0)
    rstd = tl.load(RSTD + n * G + g, g < G, 0.0)
    weight = tl.load(WEIGHT + c, there, 0.0).to(tl.float32)
    dy = tl.load(DY + offset, inside, 0.0).to(tl.float32)
    x = tl.load(X + offset, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, x - mean[None, :, None], 0.0)
    if RELU and HAS_RESIDUAL:
        dy = let_through(dy, tl.load(Y + offset, inside, 0.0).to(tl.float32))
        tl.store(DRESIDUAL + offset, dy.to(DRESIDUAL.dtype.element_ty), inside)
    elif RELU:
        bias = tl.load(BIAS + c, there, 0.0).to(tl.float32)
        dy = let_through(dy, centred * (rstd[:, None] * weight)[None, :, :] + bias[None, :, :])
    normalised = centred * rstd[None, :, None]
    tl.store(SUMS + n * C + c, tl.sum(dy, 0), there)
    tl.store(DOTS + n * C + c, tl.sum(dy * normalised, 0), there)
    dy *= weight[None, :, :]
    shift = _mean(dy, size)
    slope = _mean(dy * normalised, size)
    dx = rstd[None, :, None] * (dy - shift[None, :, None] - normalised * slope[None, :, None])
    tl.store(DX + offset, dx.to(DX.dtype.element_ty), inside)


def _tile_shape(x: Tensor, groups: int) -> dict[str, int | bool]:
    last = not x.is_contiguous()
    channels = x.shape[1] // groups
    width = triton.next_power_of_2(channels)
    positions = triton.next_power_of_2(x.shape[2] * x.shape[3])
    beside = 1
    while last and beside < groups and beside * width < CHANNELS:
        if 2 * beside * width * positions > LARGEST_TILE:
            break
        beside *= 2
    blocks = {"BLOCK_P": positions, "GROUPS": beside, "BLOCK_D": width}
    return {"CHANNELS_LAST": last, "D": channels, **blocks}


def fits(x: Tensor, groups: int) -> bool:
    """Whether the groups of x are small enough."""
    tile = _tile_shape(x, groups)
    return tile["BLOCK_P"] * tile["GROUPS"] * tile["BLOCK_D"] <= LARGEST_TILE


def _warps(tile: dict) -> int:
    """8 elements for each of a warp's 32 threads, as far as there are so many."""
    return max(1, min(16, tile["BLOCK_P"] * tile["GROUPS"] * tile["BLOCK_D"] // 256))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    residual: Tensor | None, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `split.forward`."""
    n, c, h, w = x.shape
    tile = _tile_shape(x, groups)
    y = torch.empty_like(x)
    mean, rstd = x.new_empty((2, n, groups), dtype=torch.float32)
    _forward_kernel[(n, triton.cdiv(groups, tile["GROUPS"]))](
        x, residual, y, mean, rstd, weight, bias, c, h * w, groups, eps,
        HAS_RESIDUAL=residual is not None, RELU=relu, **tile, num_warps=_warps(tile),
    )  # fmt: skip
    return y, mean, rstd


def normalise(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    groups: int, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """As `split.normalise`; statistics cost nothing where the group is in registers."""
    return forward(x, weight, bias, groups, eps, None, relu)[0]


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor,
    mean: Tensor, rstd: Tensor, groups: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `split.backward`."""
    n, c, h, w = x.shape
    tile = _tile_shape(x, groups)
    dx = torch.empty_like(x)
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    shares = x.new_empty((2, n, c), dtype=torch.float32)
    _backward_kernel[(n, triton.cdiv(groups, tile["GROUPS"]))](
        dy, x, y, dx, dresidual, mean, rstd, weight, bias, *shares, c, h * w, groups,
        HAS_RESIDUAL=y is not None, RELU=relu, **tile, num_warps=_warps(tile),
    )  # fmt: skip
    dbias, dweight = shares.sum(1)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dresidual
