"""Time the norm operators of a detector: gn_det's, PyTorch's, the compiler's, Liger's."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from gn_det.layers import group_norm_act

from .timing import interleave

Operator = Callable[..., Tensor]
COMPILED = "compiled"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Up to this H * W a group fits in a GPU's registers, so that the kernel reads the input only once
ROI = 14 * 14


def operator_shapes(
    images: int, height: int, width: int, rois: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, int, int, int], bool]]:
    """Shapes of the norm layers of an R50-FPN Mask R-CNN.

    Args:
        images: per batch.
        height: of the images, in pixels.
        width: of the images, in pixels.
        rois: per image in the box head and in the mask head.

    Yields:
        layer name, (N, C, H, W), and whether a residual is added.
    """
    yield "stem", (images, 64, height // 2, width // 2), False
    for i, channels in enumerate((64, 128, 256, 512), start=2):
        side = height // 2**i, width // 2**i
        yield f"res{i}", (images, channels, *side), False
        yield f"res{i}, wide", (images, 4 * channels, *side), True
    for i in range(2, 6):
        yield f"p{i}", (images, 256, height // 2**i, width // 2**i), False
    yield "box head", (images * rois[0], 256, 7, 7), False
    yield "mask head", (images * rois[1], 256, 14, 14), False


def operators() -> dict[str, Operator]:
    """Implementations by name of relu(GN(x) * weight + bias + residual), residual optional."""

    def native(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        y = F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype))
        return F.relu_(y if residual is None else y + residual)

    functions: dict[str, Operator] = {
        "fused": lambda x, w, b, r: group_norm_act(x, w, b, 32, 1e-5, r, True),
        "native": native,
    }
    if torch.cuda.is_available():
        functions[COMPILED] = torch.compile(native, dynamic=True)
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction
    except ImportError:
        return functions

    def liger(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        flat = x.flatten(2)
        y = LigerGroupNormFunction.apply(flat, weight, bias, x.shape[1], 32, 1e-5).view_as(x)
        return F.relu_(y if residual is None else y + residual)

    return {**functions, "Liger": liger}


def operator_rows(
    images: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    functions: dict[str, Operator],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Time operators at the shapes of a detector.

    Args:
        images: per batch.
        size: height and width of the images, in pixels.
        dtype: of the feature maps.
        functions: as `operators` returns them.
        rounds: of each measurement.

    Yields:
        a row for each layer, memory format, way and operator, with "ms" and "bandwidth": the
        minimum memory traffic per second, as a fraction of the bandwidth of a copy.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth, warm_up = _copy_bandwidth(device), min(3, rounds)
    torch._dynamo.config.recompile_limit = 64
    rois = (512, 128) if device == "cuda" else (64, 16)
    for name, shape, residual in operator_shapes(images, *size, rois):
        for layout, memory_format in LAYOUTS.items():
            x, r, dy = (torch.randn(shape, device=device, dtype=dtype) for _ in "xrd")
            x, r, dy = (t.contiguous(memory_format=memory_format) for t in (x, r, dy))
            weight, bias = torch.randn(2, shape[1], device=device)
            inputs = [t.requires_grad_() for t in (x, weight, bias, r)]
            if not residual:
                inputs[3] = None
            for both in (False, True):
                steps = {
                    operator: partial(_operate, function, inputs, dy if both else None)
                    for operator, function in functions.items()
                }
                least = _passes(shape, residual, both) * x.numel() * x.element_size() / bandwidth
                timed = interleave(steps, rounds, warm_up, cold=True)
                for operator, times in timed.items():
                    way = "forward and backward" if both else "forward"
                    row = {"images": images, "layer": name, "layout": layout, "operator": operator}
                    row |= {"way": way, "ms": 1e3 * times.median}
                    yield {**row, "bandwidth": least / times.median, "spread": times.spread}


def _copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a copy in device memory."""
    source = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = interleave({"copy": lambda: target.copy_(source)}, rounds=20, cold=True)
    return 2 * source.numel() / copies["copy"].median


def _passes(shape: tuple[int, int, int, int], residual: bool, both: bool) -> int:
    """Tensors of the size of x that are read and written at least."""
    if shape[2] * shape[3] <= ROI:
        return 2 + residual + (3 + 2 * residual) * both
    return 3 + residual + (5 + 2 * residual) * both


def _operate(function: Operator, inputs: list[Tensor | None], dy: Tensor | None) -> None:
    """Run an operator forward, and backward if `dy` is given."""
    if dy is None:
        with torch.no_grad():
            function(*inputs)
    else:
        present = [t for t in inputs if t is not None]
        torch.autograd.grad(function(*inputs), present, dy)
