"""Triton kernels of the normalisations. Nothing here is imported before a tensor needs it."""

import importlib.util
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# For tests: whether they run on the CPU too, which takes a process with TRITON_INTERPRET=1
INTERPRETED = False
HAS_TRITON = importlib.util.find_spec("triton") is not None


def covers(x: Tensor) -> bool:
    """Whether the kernels run on x, (N, C, H, W): on GPUs of compute capability 8.0 and newer."""
    if not (x.is_cuda or INTERPRETED) or not HAS_TRITON:
        return False
    if x.dtype not in DTYPES or x.dim() != 4 or x.numel() == 0:
        return False
    # A GPU counts no further in a grid's last dimension, nor offsets within an image
    if x.shape[0] >= 2**16 or x.stride(0) >= 2**31:
        return False
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return False
    return INTERPRETED or _is_new_enough(x.device.index)


@cache
def _is_new_enough(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
