"""Combine what the kernels in `split` have reduced: the chunks of a group, or of a channel.

SUMS and MEANS have shape (2, N, S, C), for N images, S chunks and C channels; SHARES is N * S * C.
"""

import triton
import triton.language as tl


@triton.jit
def group_moments(
    MEANS, n, g, C, HW, CHUNK, S, G, SHARES, eps, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Mean and 1 / standard deviation of one group."""
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
        within = tl.load(MEANS + SHARES + rows + d[None, :], inside, 0.0)
        delta = tl.where(inside, means - mean, 0.0)
        m2 += tl.sum(tl.sum(within + delta * delta * count[:, None], 1), 0)
        first += BLOCK_D
    return mean, 1.0 / tl.sqrt(m2 / size + eps)


@triton.jit(do_not_specialize=["HW", "CHUNK", "S", "G", "SHARES"])
def group_moments_kernel(
    MEANS, MEAN, RSTD, C, HW, CHUNK, S, G, SHARES, eps,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`group_moments` of each group, both (N, G)."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    mean, rstd = group_moments(
        MEANS, n, g, C, HW, CHUNK, S, G, SHARES, eps, BLOCK_D, BLOCK_S
    )  # fmt: skip
    tl.store(MEAN + tl.program_id(0), mean)
    tl.store(RSTD + tl.program_id(0), rstd)


@triton.jit
def group_gradients(
    SUMS, WEIGHT, n, g, C, HW, S, G, SHARES, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Means over one group of weight * dy and of weight * dy * (x - mean) * rstd."""
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
        slope += tl.sum(weight * tl.sum(tl.load(SUMS + SHARES + slot, inside, 0.0), 0), 0)
        first += BLOCK_D
    size = 1.0 * D * HW
    return shift / size, slope / size


@triton.jit(do_not_specialize=["HW", "S", "G", "SHARES"])
def group_gradients_kernel(
    SUMS, WEIGHT, SHIFT, C, HW, S, G, SHARES, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """`group_gradients` of each group, (2, N, G)."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    shift, slope = group_gradients(SUMS, WEIGHT, n, g, C, HW, S, G, SHARES, BLOCK_D, BLOCK_S)
    tl.store(SHIFT + tl.program_id(0), shift)
    tl.store(SHIFT + tl.num_programs(0) + tl.program_id(0), slope)


@triton.jit
def column_sums(ROW, c, C, ROWS):
    """Sums over the rows of a (ROWS, C) matrix, for columns c."""
    sums = tl.zeros(c.shape, tl.float32)
    first = 0
    while first < ROWS:
        row = first + tl.arange(0, 16)
        inside = (row < ROWS)[:, None] & (c < C)[None, :]
        sums += tl.sum(tl.load(ROW + row[:, None] * C + c[None, :], inside, 0.0), 0)
        first += 16
    return sums
