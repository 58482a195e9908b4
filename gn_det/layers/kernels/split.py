"""Kernels that split each group over many programs, for large feature maps.

At 2 images and 32 groups, one program per group would leave half of a GPU idle, and a group of a
megabyte does not fit in registers. So every channel of every image is cut into S chunks of
positions. The first kernel reduces each chunk, and the last processes all elements again. Where a
group has few chunks, each program of the last kernel combines them itself; otherwise a small kernel
between the two does. Results are the same in every run, because each element of the workspace has a
single writer.

Loops are `while` loops because Triton's interpreter does not support `range` up to a tensor.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine import (
    column_sums,
    group_gradients,
    group_gradients_kernel,
    group_moments,
    group_moments_kernel,
)
from .launch import Launch, types_of
from .tile import ceil_div, divisible, offsets, power_of_2, relu_gradient, tiles

# Number of programs that keeps a large GPU busy: 16 for each of an H100's 132 multiprocessors
PROGRAMS = 16 * 132
# A program of the last kernel combines up to this number of chunks and channels itself: on a GPU
# that waits for the CPU, a launch costs more
FOLDED = 256


@triton.jit(do_not_specialize=["HW", "CHUNK", "SHARES"])
def _moments_kernel(
    X, MEANS, C, HW, CHUNK, SHARES, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel in each chunk, (2, N, S, C)."""
    if ALIGNED:
        HW = HW // 8 * 8
        CHUNK = CHUNK // 8 * 8
    s, n = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_P)
    x_ptr = X + n.to(tl.int64) * C * HW
    start = s * CHUNK
    end = tl.minimum(start + CHUNK, HW)
    # Welford's algorithm in each lane of the tile; then Chan's formula combines the lanes
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    count = 0.0
    first = start
    while first < end:
        p = first + lane
        inside = (p < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + offsets(p, c, HW, C, CHANNELS_LAST), inside, 0.0).to(tl.float32)
        count += 1.0
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += delta * (x - mean)
        first += BLOCK_P
    counts = tl.maximum(end - start - lane + BLOCK_P - 1, 0) // BLOCK_P
    counts = counts.to(tl.float32)[:, None]
    chunk_mean = tl.sum(mean * counts, 0) / (end - start).to(tl.float32)
    delta = mean - chunk_mean[None, :]
    slot = (n * tl.num_programs(0) + s) * C + c
    tl.store(MEANS + slot, chunk_mean, c < C)
    tl.store(MEANS + SHARES + slot, tl.sum(m2 + delta * delta * counts, 0), c < C)


@triton.jit(do_not_specialize=["HW", "CHUNK", "S", "G", "SHARES"])
def _normalize_kernel(
    X, RESIDUAL, Y, MEANS, MEAN, RSTD, WEIGHT, BIAS, C, HW, CHUNK, S, G, SHARES, eps,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) * rstd * weight + bias + residual)

    With FOLD, which needs a BLOCK_C of 1, mean and rstd are computed from MEANS and stored.
    """
    if ALIGNED:
        HW = HW // 8 * 8
    n = tl.program_id(2)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < HW)[:, None] & (c < C)[None, :]
    offset = n.to(tl.int64) * C * HW + offsets(p, c, HW, C, CHANNELS_LAST)
    x = tl.load(X + offset, inside, 0.0).to(tl.float32)
    group = n * G + c // (C // G)
    if FOLD:
        g = tl.program_id(1) // (C // G)
        mean, rstd = group_moments(
            MEANS, n, g, C, HW, CHUNK, S, G, SHARES, eps, BLOCK_D, BLOCK_S
        )  # fmt: skip
        if (tl.program_id(0) == 0) & (tl.program_id(1) % (C // G) == 0):
            tl.store(MEAN + n * G + g, mean)
            tl.store(RSTD + n * G + g, rstd)
        mean = mean + tl.zeros((BLOCK_C,), tl.float32)
    else:
        mean = tl.load(MEAN + group, c < C, 0.0)
        rstd = tl.load(RSTD + group, c < C, 0.0)
    scale = rstd * tl.load(WEIGHT + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(BIAS + c, c < C, 0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        y += tl.load(RESIDUAL + offset, inside, 0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, tl.PropagateNan.ALL)
    tl.store(Y + offset, y.to(Y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["HW", "G", "CHUNK", "SHARES"])
def _gradient_sums_kernel(
    DY, X, Y, DRESIDUAL, MEAN, RSTD, WEIGHT, BIAS, SUMS, C, HW, G, CHUNK, SHARES,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy * (x - mean) * rstd over each channel in each chunk, (2, N, S, C).

    dy is first masked by the ReLU. With a residual, the masked dy is stored as its gradient.
    """
    if ALIGNED:
        HW = HW // 8 * 8
        CHUNK = CHUNK // 8 * 8
    s, n = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = n.to(tl.int64) * C * HW
    group = n * G + c // (C // G)
    mean = tl.load(MEAN + group, c < C, 0.0)
    rstd = tl.load(RSTD + group, c < C, 0.0)
    weight = tl.load(WEIGHT + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(BIAS + c, c < C, 0.0).to(tl.float32)
    start = s * CHUNK
    end = tl.minimum(start + CHUNK, HW)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    dots = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = start
    while first < end:
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < end)[:, None] & (c < C)[None, :]
        offset = image + offsets(p, c, HW, C, CHANNELS_LAST)
        dy = tl.load(DY + offset, inside, 0.0).to(tl.float32)
        centered = tl.load(X + offset, inside, 0.0).to(tl.float32) - mean[None, :]
        if RELU and HAS_RESIDUAL:
            dy = relu_gradient(dy, tl.load(Y + offset, inside, 0.0).to(tl.float32))
            tl.store(DRESIDUAL + offset, dy.to(DRESIDUAL.dtype.element_ty), inside)
        elif RELU:
            dy = relu_gradient(dy, centered * (rstd * weight)[None, :] + bias[None, :])
        total += dy
        dots += dy * (centered * rstd[None, :])
        first += BLOCK_P
    slot = (n * tl.num_programs(0) + s) * C + c
    tl.store(SUMS + slot, tl.sum(total, 0), c < C)
    tl.store(SUMS + SHARES + slot, tl.sum(dots, 0), c < C)


@triton.jit(do_not_specialize=["HW", "S", "G", "ROWS", "SHARES"])
def _input_gradient_kernel(
    DY, X, DX, MEAN, RSTD, WEIGHT, BIAS, SHIFT, SUMS, DWEIGHT, DBIAS, C, HW, S, G, ROWS, SHARES,
    RELU: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (weight * dy - shift - (x - mean) * rstd * slope)

    The first programs also add up the gradients of weight and bias, over ROWS = N * S chunks. With
    FOLD, which needs a BLOCK_C of 1, shift and slope are computed from SUMS.
    """
    if ALIGNED:
        HW = HW // 8 * 8
    n = tl.program_id(2)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < HW)[:, None] & (c < C)[None, :]
    offset = n.to(tl.int64) * C * HW + offsets(p, c, HW, C, CHANNELS_LAST)
    group = n * G + c // (C // G)
    rstd = tl.load(RSTD + group, c < C, 0.0)
    weight = tl.load(WEIGHT + c, c < C, 0.0).to(tl.float32)
    dy = tl.load(DY + offset, inside, 0.0).to(tl.float32)
    centered = tl.load(X + offset, inside, 0.0).to(tl.float32)
    centered -= tl.load(MEAN + group, c < C, 0.0)[None, :]
    if RELU:
        bias = tl.load(BIAS + c, c < C, 0.0).to(tl.float32)
        dy = relu_gradient(dy, centered * (rstd * weight)[None, :] + bias[None, :])
    if FOLD:
        g = tl.program_id(1) // (C // G)
        shift, slope = group_gradients(SUMS, WEIGHT, n, g, C, HW, S, G, SHARES, BLOCK_D, BLOCK_S)
    else:
        shift = tl.load(SHIFT + group, c < C, 0.0)
        slope = tl.load(SHIFT + tl.num_programs(2) * G + group, c < C, 0.0)
    shift = shift * rstd
    slope = slope * rstd * rstd
    dx = dy * (rstd * weight)[None, :] - shift[None, :] - centered * slope[None, :]
    tl.store(DX + offset, dx.to(DX.dtype.element_ty), inside)
    if (tl.program_id(0) == 0) & (n == 0):
        total = column_sums(SUMS, c, C, ROWS)
        dots = column_sums(SUMS + SHARES, c, C, ROWS)
        tl.store(DBIAS + c, total.to(DBIAS.dtype.element_ty), c < C)
        tl.store(DWEIGHT + c, dots.to(DWEIGHT.dtype.element_ty), c < C)


class _Plan(NamedTuple):
    """The launches of a pass, and how many positions each chunk has."""

    shares: tuple[int, int, int, int]  # shape of the workspace
    chunk: int
    over_chunks: Launch
    over_groups: Launch | None  # None if `over_all` combines the chunks itself
    over_all: Launch


@lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, types: tuple, last: bool, groups: int,
    residual: bool, relu: bool, forward: bool,
) -> _Plan:  # fmt: skip
    n, c, h, w = shape
    tile = tiles(c, h * w, last)
    columns = ceil_div(c, tile["BLOCK_C"])
    chunks = min(ceil_div(PROGRAMS, n * columns), ceil_div(h * w, tile["BLOCK_P"]), 512)
    chunk = ceil_div(ceil_div(h * w, chunks), tile["BLOCK_P"]) * tile["BLOCK_P"]
    chunks = ceil_div(h * w, chunk)
    block_s = power_of_2(chunks)
    block_d = min(64, power_of_2(c // groups), 4096 // block_s)
    blocks = {"BLOCK_D": block_d, "BLOCK_S": block_s}
    fold = not last and chunks * (c // groups) <= FOLDED
    folded = {"FOLD": True, **blocks} if fold else _APART
    grid = ceil_div(h * w, tile["BLOCK_P"]), columns, n
    flags = {"HAS_RESIDUAL": residual, "RELU": relu}
    types = types, divisible(c)
    if forward:
        over_chunks = Launch(_moments_kernel, (chunks, columns, n), types, **tile)
        over_all = Launch(_normalize_kernel, grid, types, **flags, **tile, **folded)
    else:
        over_chunks = Launch(_gradient_sums_kernel, (chunks, columns, n), types, **flags, **tile)
        # With a residual, the ReLU has already masked dy
        masks = {"RELU": relu and not residual}
        over_all = Launch(_input_gradient_kernel, grid, types, **masks, **tile, **folded)
    over_groups = group_moments_kernel if forward else group_gradients_kernel
    apart = None if fold else Launch(over_groups, (n * groups, 1, 1), types, **blocks)
    return _Plan((2, n, chunks, c), chunk, over_chunks, apart, over_all)


# Constants of the last kernel if another combines the chunks
_APART: dict[str, int | bool] = {"FOLD": False, "BLOCK_D": 1, "BLOCK_S": 1}


@lru_cache(maxsize=4096)
def _normalization(
    shape: torch.Size, types: tuple, last: bool, residual: bool, relu: bool
) -> Launch:
    n, c, h, w = shape
    tile = tiles(c, h * w, last)
    grid = ceil_div(h * w, tile["BLOCK_P"]), ceil_div(c, tile["BLOCK_C"]), n
    flags = {"HAS_RESIDUAL": residual, "RELU": relu}
    return Launch(_normalize_kernel, grid, (types, divisible(c)), **flags, **tile, **_APART)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    residual: Tensor | None, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute `group_norm_act`; arguments and results are those of `eager.group_norm`."""
    n, c, h, w = shape = x.shape
    types = types_of(x, residual, weight, bias)
    plan = _plan(shape, types, not x.is_contiguous(), groups, residual is not None, relu, True)
    y = torch.empty_like(x)
    shares = x.new_empty(plan.shares, dtype=torch.float32)
    mean = x.new_empty((n, groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    chunks, count = plan.shares[2], n * plan.shares[2] * c
    plan.over_chunks(x, shares, c, h * w, plan.chunk, count)
    sizes = c, h * w, plan.chunk, chunks, groups, count
    if plan.over_groups:
        plan.over_groups(shares, mean, rstd, *sizes, eps)
    plan.over_all(x, residual, y, shares, mean, rstd, weight, bias, *sizes, eps)
    return y, mean, rstd


def normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    groups: int, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """Recompute y from the saved statistics, with the same bits as `forward` without a residual."""
    y, shape, types = torch.empty_like(x), x.shape, types_of(x, None, weight, bias)
    launch = _normalization(shape, types, not x.is_contiguous(), False, relu)
    sizes = shape[1], shape[2] * shape[3], 1, 1, groups, 1
    launch(x, None, y, x, mean, rstd, weight, bias, *sizes, 0.0)
    return y


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor,
    mean: Tensor, rstd: Tensor, groups: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients as `eager.group_norm_backward`; `y` is given only with a residual."""
    n, c, h, w = shape = x.shape
    types = types_of(x, y, weight, bias)
    plan = _plan(shape, types, not x.is_contiguous(), groups, y is not None, relu, False)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    shares = x.new_empty(plan.shares, dtype=torch.float32)
    chunks, rows = plan.shares[2], n * plan.shares[2]
    plan.over_chunks(
        dy, x, y, dresidual, mean, rstd, weight, bias, shares,
        c, h * w, groups, plan.chunk, rows * c,
    )  # fmt: skip
    shift = shares
    if plan.over_groups:
        shift = x.new_empty((2, n, groups), dtype=torch.float32)
        plan.over_groups(shares, weight, shift, c, h * w, chunks, groups, rows * c)
    plan.over_all(
        dy if y is None else dresidual, x, dx, mean, rstd, weight, bias, shift,
        shares, dweight, dbias, c, h * w, chunks, groups, rows, rows * c,
    )  # fmt: skip
    return dx, dweight, dbias, dresidual
