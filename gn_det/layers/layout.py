"""Memory formats: contiguous (NCHW) and channels_last (NHWC), and nothing else."""

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """Contiguous copy of what has neither of the two formats; all else comes back itself."""
    return x if x.is_contiguous(memory_format=_format(x)) else x.contiguous()


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the dtype and memory format of a dense x; itself where it is so already."""
    tensor = tensor if tensor.dtype == x.dtype else tensor.to(x.dtype)
    return tensor.contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    if x.dim() == 4 and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
