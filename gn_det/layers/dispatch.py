"""Choice of the implementation for a tensor, and of the memory format that it needs.

- While a model is traced or exported: PyTorch's own operators, which other runtimes support.
- On GPUs of compute capability 8.0 or newer: the Triton kernels in `kernels`, if they pass a test
  on the device.
- Everywhere else: PyTorch's native kernels, in `eager`.
"""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tests set this to run the kernels on the CPU, in a process with TRITON_INTERPRET=1
INTERPRETED = False
HAS_TRITON = importlib.util.find_spec("triton") is not None


def is_exporting() -> bool:
    """Whether the model is being traced or exported, and must use PyTorch's own operators."""
    # `torch.compiler.is_exporting()` is true under torch.compile, too, up to PyTorch 2.11. PyTorch
    # 2.6 cannot tell at all: the models that it exports contain gn_det's operators
    return torch.jit.is_tracing() or getattr(torch.compiler, "_is_exporting_flag", False)


def has_kernel(x: Tensor) -> bool:
    """Whether the Triton kernels support x.

    They need a GPU of compute capability 8.0 or newer that passes `kernels_work`, and a tensor of
    shape (N, C, H, W), float32, bfloat16 or float16, contiguous or channels_last, not empty.
    """
    if not (x.is_cuda or INTERPRETED) or not HAS_TRITON:
        return False
    if x.dtype not in DTYPES or x.dim() != 4 or x.numel() == 0:
        return False
    # N is a grid's last dimension, below 2**16; offsets within an image are 32-bit
    if x.shape[0] >= 2**16 or x.stride(0) >= 2**31:
        return False
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return False
    return INTERPRETED or _supports_kernels(x.device.index)


@cache
def _supports_kernels(device: int) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from .self_test import kernels_work

    with torch.cuda.device(device), torch.no_grad():
        return kernels_work(torch.device("cuda", device))


def dense(x: Tensor) -> Tensor:
    """Return x if it is contiguous (NCHW) or channels_last (NHWC), else a contiguous copy."""
    return x if x.is_contiguous(memory_format=_format(x)) else x.contiguous()


def cast_like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return `tensor` in the dtype and memory format of a dense x, copied only if they differ."""
    tensor = tensor if tensor.dtype == x.dtype else tensor.to(x.dtype)
    return tensor.contiguous(memory_format=_format(x))


def aligned(*tensors: Tensor | None) -> list[Any]:
    """Copy those of the tensors that do not start at a multiple of 16 bytes, as kernels expect."""
    return [t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in tensors]


def on_device_of(x: Tensor) -> AbstractContextManager:
    """A context in which the current device is that of x."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _format(x: Tensor) -> torch.memory_format:
    if x.dim() == 4 and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_plain(x: Tensor) -> bool:
    """Whether an operator's function can be called directly, past PyTorch's dispatcher.

    Compilers, tensor subclasses and dispatch modes have to see the operator itself.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )
