"""The tiles in which kernels process an image: BLOCK_P positions of BLOCK_C channels.

NCHW and channels_last differ only in strides and tile shape.
"""

import triton
import triton.language as tl

# TILE is the number of elements of a tile. channels_last tiles are CHANNELS channels wide, NCHW
# tiles cover positions of a single channel
TILE, CHANNELS = 2048, 64


def ceil_div(count: int, size: int) -> int:
    """Number of blocks of `size` that cover `count`; Triton's own function takes much longer."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest power of two that is not below `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()


@triton.jit
def offsets(p, c, HW, C, CHANNELS_LAST: tl.constexpr):
    """Offsets of positions p and channels c from the start of an image, (BLOCK_P, BLOCK_C)."""
    if CHANNELS_LAST:
        return p[:, None] * C + c[None, :]
    return c[None, :] * HW + p[:, None]


@triton.jit
def relu_gradient(dy, y):
    """Gradient of a ReLU with output (or input) y; like PyTorch's, it passes dy where y is NaN."""
    return tl.where(y <= 0, 0.0, dy)


def tiles(channels: int, positions: int, last: bool) -> dict[str, int | bool]:
    """The shape and layout of tiles, which are constants of the kernels that process them.

    Args:
        channels: C.
        positions: H * W.
        last: whether the memory format is channels_last.
    """
    width = min(CHANNELS, power_of_2(channels)) if last else 1
    height = min(TILE // width, power_of_2(positions))
    # 16-bit values are loaded 8 at a time only if the compiler knows that every channel starts at a
    # multiple of 8 elements; `HW = HW // 8 * 8` in the kernels tells it
    aligned = positions % 8 == 0
    return {"ALIGNED": aligned, "CHANNELS_LAST": last, "BLOCK_P": height, "BLOCK_C": width}


def divisible(channels: int) -> int:
    """What Triton specializes a number of channels by: 1, a multiple of 16, or anything else."""
    return 16 if channels % 16 == 0 else min(channels, 2)
