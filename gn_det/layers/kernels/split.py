"""Kernels that split each group over many programs, for large feature maps.

At 2 images and 32 groups, one program per group would leave half of a GPU idle, and a group of a
megabyte does not fit in registers. So every channel of every image is cut into S chunks of
positions. The first kernel reduces each chunk, a small second one combines the chunks of a group,
and the third processes all elements again. Results are the same in every run, because each element
of the workspace has a single writer.

Loops are `while` loops because Triton's interpreter does not support `range` up to a tensor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import ceil_div, offsets, power_of_2, relu_gradient, tiles

# Number of programs that keeps a large GPU busy: 16 for each of an H100's 132 multiprocessors
PROGRAMS = 16 * 132


@triton.jit
def _moments_kernel(
    X, MEANS, M2S, C, HW, CHUNK, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel in each chunk, both (N, S, C)."""
    if ALIGNED:
        HW = HW // 8 * 8
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
    tl.store(M2S + slot, tl.sum(m2 + delta * delta * counts, 0), c < C)


@triton.jit
def _group_moments_kernel(
    MEANS, M2S, MEAN, RSTD, C, HW, CHUNK, S, G, eps,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each group, both (N, G), from `_moments_kernel`."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    D = C // G
    s = tl.arange(0, BLOCK_S)
    count = tl.maximum(tl.minimum(HW - s * CHUNK, CHUNK), 0).to(tl.float32)
    size = 1.0 * D * HW
    rows = (n * S + s[:, None]) * C + g * D
    mean = 0.0
    first = 0
    while first < D:
        d = first + tl.arange(0, BLOCK_D)
        inside = (s < S)[:, None] & (d < D)[None, :]
        means = tl.load(MEANS + rows + d[None, :], inside, 0.0)
        mean += tl.sum(tl.sum(means * count[:, None], 1), 0) / size
        first += BLOCK_D
    m2 = 0.0
    first = 0
    while first < D:
        d = first + tl.arange(0, BLOCK_D)
        inside = (s < S)[:, None] & (d < D)[None, :]
        means = tl.load(MEANS + rows + d[None, :], inside, mean)
        within = tl.load(M2S + rows + d[None, :], inside, 0.0)
        delta = tl.where(inside, means - mean, 0.0)
        m2 += tl.sum(tl.sum(within + delta * delta * count[:, None], 1), 0)
        first += BLOCK_D
    tl.store(MEAN + tl.program_id(0), mean)
    tl.store(RSTD + tl.program_id(0), 1.0 / tl.sqrt(m2 / size + eps))


@triton.jit
def _normalize_kernel(
    X, RESIDUAL, Y, MEAN, RSTD, WEIGHT, BIAS, C, HW, G,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) * rstd * weight + bias + residual)"""
    if ALIGNED:
        HW = HW // 8 * 8
    n = tl.program_id(2)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < HW)[:, None] & (c < C)[None, :]
    offset = n.to(tl.int64) * C * HW + offsets(p, c, HW, C, CHANNELS_LAST)
    group = n * G + c // (C // G)
    mean = tl.load(MEAN + group, c < C, 0.0)
    scale = tl.load(RSTD + group, c < C, 0.0) * tl.load(WEIGHT + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(BIAS + c, c < C, 0.0).to(tl.float32)
    x = tl.load(X + offset, inside, 0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        y += tl.load(RESIDUAL + offset, inside, 0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, tl.PropagateNan.ALL)
    tl.store(Y + offset, y.to(Y.dtype.element_ty), inside)


@triton.jit
def _gradient_sums_kernel(
    DY, X, Y, DRESIDUAL, MEAN, RSTD, WEIGHT, BIAS, SUMS, DOTS, C, HW, G, CHUNK,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy * (x - mean) * rstd over each channel in each chunk, both (N, S, C).

    dy is first masked by the ReLU. With a residual, the masked dy is stored as its gradient.
    """
    if ALIGNED:
        HW = HW // 8 * 8
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
    tl.store(DOTS + slot, tl.sum(dots, 0), c < C)


@triton.jit
def _group_gradients_kernel(
    SUMS, DOTS, WEIGHT, SHIFT, SLOPE, C, HW, S, G, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Means over each group of weight * dy and of weight * dy * (x - mean) * rstd, both (N, G)."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    D = C // G
    s = tl.arange(0, BLOCK_S)
    shift = 0.0
    slope = 0.0
    first = 0
    while first < D:
        d = first + tl.arange(0, BLOCK_D)
        c = g * D + d
        inside = (s < S)[:, None] & (d < D)[None, :]
        slot = (n * S + s[:, None]) * C + c[None, :]
        weight = tl.load(WEIGHT + c, d < D, 0.0).to(tl.float32)
        shift += tl.sum(weight * tl.sum(tl.load(SUMS + slot, inside, 0.0), 0), 0)
        slope += tl.sum(weight * tl.sum(tl.load(DOTS + slot, inside, 0.0), 0), 0)
        first += BLOCK_D
    size = 1.0 * D * HW
    tl.store(SHIFT + tl.program_id(0), shift / size)
    tl.store(SLOPE + tl.program_id(0), slope / size)


@triton.jit
def _input_gradient_kernel(
    DY, X, DX, MEAN, RSTD, WEIGHT, BIAS, SHIFT, SLOPE, C, HW, G,
    RELU: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (weight * dy - shift - (x - mean) * rstd * slope)"""
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
    shift = tl.load(SHIFT + group, c < C, 0.0) * rstd
    slope = tl.load(SLOPE + group, c < C, 0.0) * rstd * rstd
    dx = dy * (rstd * weight)[None, :] - shift[None, :] - centered * slope[None, :]
    tl.store(DX + offset, dx.to(DX.dtype.element_ty), inside)


def _chunks(x: Tensor, tile: dict) -> tuple[int, int]:
    """Number of chunks per channel, and number of positions per chunk."""
    positions = x.shape[2] * x.shape[3]
    programs = x.shape[0] * ceil_div(x.shape[1], tile["BLOCK_C"])
    chunks = min(ceil_div(PROGRAMS, programs), ceil_div(positions, tile["BLOCK_P"]), 512)
    size = ceil_div(ceil_div(positions, chunks), tile["BLOCK_P"]) * tile["BLOCK_P"]
    return ceil_div(positions, size), size


def _blocks(channels_per_group: int, chunks: int) -> dict[str, int]:
    block_s = power_of_2(chunks)
    block_d = min(64, power_of_2(channels_per_group), 4096 // block_s)
    return {"BLOCK_D": block_d, "BLOCK_S": block_s}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    residual: Tensor | None, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute `group_norm_act`; arguments and results are those of `eager.group_norm`."""
    n, c, h, w = x.shape
    tile = tiles(x)
    chunks, size = _chunks(x, tile)
    means, m2s = (x.new_empty((n, chunks, c), dtype=torch.float32) for _ in range(2))
    mean, rstd = (x.new_empty((n, groups), dtype=torch.float32) for _ in range(2))
    grid = (chunks, ceil_div(c, tile["BLOCK_C"]), n)
    _moments_kernel[grid](x, means, m2s, c, h * w, size, **tile)
    blocks = _blocks(c // groups, chunks)
    _group_moments_kernel[(n * groups,)](
        means, m2s, mean, rstd, c, h * w, size, chunks, groups, eps, **blocks
    )
    return _normalize(x, mean, rstd, weight, bias, groups, residual, relu), mean, rstd


def normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    groups: int, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """Recompute y from the saved statistics, with the same bits as `forward` without a residual."""
    return _normalize(x, mean, rstd, weight, bias, groups, None, relu)


def _normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int,
    residual: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    n, c, h, w = x.shape
    tile = tiles(x)
    y = torch.empty_like(x)
    grid = (ceil_div(h * w, tile["BLOCK_P"]), ceil_div(c, tile["BLOCK_C"]), n)
    _normalize_kernel[grid](
        x, residual, y, mean, rstd, weight, bias, c, h * w, groups,
        HAS_RESIDUAL=residual is not None, RELU=relu, **tile,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor,
    mean: Tensor, rstd: Tensor, groups: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients as `eager.group_norm_backward`; `y` is given only with a residual."""
    n, c, h, w = x.shape
    tile = tiles(x)
    chunks, size = _chunks(x, tile)
    dx = torch.empty_like(x)
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    workspace = x.new_empty((2, n, chunks, c), dtype=torch.float32)
    sums, dots = workspace[0], workspace[1]  # unpacking the tensor takes much longer
    shift, slope = (x.new_empty((n, groups), dtype=torch.float32) for _ in range(2))
    columns = ceil_div(c, tile["BLOCK_C"])
    _gradient_sums_kernel[(chunks, columns, n)](
        dy, x, y, dresidual, mean, rstd, weight, bias, sums, dots, c, h * w, groups, size,
        HAS_RESIDUAL=y is not None, RELU=relu, **tile,
    )  # fmt: skip
    _group_gradients_kernel[(n * groups,)](
        sums, dots, weight, shift, slope, c, h * w, chunks, groups, **_blocks(c // groups, chunks)
    )
    # With a residual, `_gradient_sums_kernel` has already masked dy and stored it
    dy, relu = (dy, relu) if y is None else (dresidual, False)
    _input_gradient_kernel[(ceil_div(h * w, tile["BLOCK_P"]), columns, n)](
        dy, x, dx, mean, rstd, weight, bias, shift, slope, c, h * w, groups,
        RELU=relu, **tile,
    )  # fmt: skip
    totals = workspace.sum((1, 2))
    return dx, totals[1].to(weight.dtype), totals[0].to(bias.dtype), dresidual
