"""Launch kernels with little work on the CPU.

At a few images per batch a GPU computes a layer faster than Triton can inspect the arguments of its
kernels. What decides which kernel is compiled is known once per shape, so that later launches go
straight to the compiled kernel, with addresses instead of tensors: for each tensor Triton would ask
the driver where it is.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# A compiled kernel takes constants too from this version on
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
# {what decides which kernel is compiled: {device: the compiled kernel}}
_compiled: dict[Hashable, dict[int, CompiledKernel]] = {}


class Launch:
    """A kernel with its grid and its constants.

    Args:
        kernel: a function decorated with `triton.jit`, whose constants come last.
        grid: number of programs in each of three dimensions.
        types: whatever else decides how arguments are compiled: data types, which tensors are None,
            and whether integers are multiples of 16, unless the kernel does not specialize them.
        num_warps: warps of 32 threads in each program.
        constants: by name.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        types: Hashable,
        num_warps: int = 4,
        **constants: int | bool,
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._options = {**constants, "num_warps": num_warps}
        self._values = [constants[name] for name in kernel.arg_names if name in constants]
        key = kernel, types, num_warps, *self._values
        self._by_device = _compiled.setdefault(key, {})
        self._direct: dict[int, Callable[..., None]] = {}

    def __call__(self, *arguments: Tensor | float | None) -> None:
        """Launch the kernel on the current device, where all tensors are.

        Args:
            arguments: all but the constants, in order. Tensors start at a multiple of 16 bytes;
                see `dispatch.aligned`. The first one is a tensor, and all others are on its device.
        """
        device = arguments[0].get_device()  # type: ignore[union-attr]
        direct = self._direct.get(device)
        if direct is None:
            compiled = self._by_device.get(device)
            if compiled is None:
                compiled = self._kernel[self._grid](*arguments, **self._options)
                if _DIRECT and isinstance(compiled, CompiledKernel):
                    self._by_device[device] = compiled
                return
            direct = self._direct[device] = _launcher(compiled, self._grid)
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        direct(device, *values, *self._values)


def _launcher(compiled: CompiledKernel, grid: tuple[int, int, int]) -> Callable[..., None]:
    """A function that launches a compiled kernel on a device's current stream.

    It is what `compiled[grid]` returns, without the hooks of Triton's profiler.
    """
    run, stream_of = compiled.run, driver.active.get_current_stream
    fixed = compiled.function, compiled.packed_metadata, None, None, None

    def launch(device: int, *values: Any) -> None:
        run(*grid, stream_of(device), *fixed, *values)

    return launch


def types_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """The data types of tensors, and None for missing ones."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)
