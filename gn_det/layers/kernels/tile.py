"""Tiles that images are gone through by: BLOCK_P positions of BLOCK_C channels.

NCHW and channels_last differ in the strides alone.
"""

import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile; channels_last tiles are CHANNELS wide, NCHW ones go along one channel
TILE, CHANNELS = 2048, 64


@triton.jit
def offsets(p, c, HW, C, CHANNELS_LAST: tl.constexpr):
    """Where positions p and channels c lie in an image."""
    if CHANNELS_LAST:
        return p[:, None] * C + c[None, :]
    return c[None, :] * HW + p[:, None]


@triton.jit
def let_through(dy, y):
    """What a ReLU that gave y, or got it, passes of the gradient; like PyTorch's, all at NaN."""
    return tl.where(y <= 0, 0.0, dy)


def tiles(x: Tensor) -> dict[str, int | bool]:
    """Shape of the tiles that x is gone through by."""
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    last = not x.is_contiguous()
    width = min(CHANNELS, triton.next_power_of_2(channels)) if last else 1
    height = min(TILE // width, triton.next_power_of_2(positions))
    # Half precision is read in pieces of 8, if the compiler knows that channels begin at such
    aligned = positions % 8 == 0
    return {"ALIGNED": aligned, "CHANNELS_LAST": last, "BLOCK_P": height, "BLOCK_C": width}
