"""A test of the Triton kernels on a device, before they are used there."""

import logging
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from . import eager

# Largest error, relative to the largest value
TOLERANCE = 1e-3
# (N, C, H, W) and groups: for the kernels of whole groups, and for those of split ones
SHAPES = {"whole": ((2, 32, 7, 7), 8), "split": ((2, 16, 40, 36), 4)}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
EPS = 1e-5


def kernels_work(device: torch.device) -> bool:
    """Whether the kernels can be built for a device, and compute there what PyTorch computes.

    Forward and backward passes on small tensors in float32 are compared with float64 on the CPU.
    The outcome is logged; the random generators are not used.

    Args:
        device: a GPU, or the CPU in Triton's interpreter.
    """
    logger = logging.getLogger(__name__)
    consequence = "PyTorch's own kernels are used, which are slower"
    try:
        wrong = list(dict.fromkeys(_wrong_results(device)))
    # Triton needs a C compiler and Python's headers, and raises errors of many types
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.warning(
            f"the Triton kernels cannot be built for {device}: {reason}. {consequence}. Triton "
            "needs a C compiler and Python's header files"
        )
        return False
    if wrong:
        logger.warning(
            f"the Triton kernels give wrong results on {device}: {', '.join(wrong)}. "
            f"{consequence}. Please report this with the versions of PyTorch, Triton and the driver"
        )
        return False
    logger.info(f"the Triton kernels give PyTorch's results on {device}")
    return True


def _wrong_results(device: torch.device) -> Iterator[str]:
    """Names of the kernels whose results differ from those of PyTorch."""
    for (name, (shape, groups)), layout, relu in product(SHAPES.items(), LAYOUTS, (False, True)):
        if not _group_norm_agrees(name, shape, groups, layout, relu, device):
            yield f"group_norm ({name})"
    for layout, relu in product(LAYOUTS, (False, True)):
        if not _frozen_bn_agrees(SHAPES["split"][0], layout, relu, device):
            yield "frozen_bn"


def _group_norm_agrees(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    layout: torch.memory_format,
    relu: bool,
    device: torch.device,
) -> bool:
    from .kernels import split, whole

    kernels = {"split": split, "whole": whole}[name]
    x, residual, dy = (_values(shape, i).to(memory_format=layout) for i in range(3))
    weight, bias = _values(shape[1:2], 3), _values(shape[1:2], 4)
    y, mean, rstd = eager.group_norm(x, weight, bias, residual, groups, EPS, relu)
    gradients = eager.group_norm_backward(dy, x, y, weight, bias, mean, rstd, groups, EPS, relu)
    x, residual, dy, weight, bias = _on(device, x, residual, dy, weight, bias)
    found = kernels.forward(x, weight, bias, groups, EPS, residual, relu)
    mask = found[0] if relu else None
    back = kernels.backward(dy, x, mask, weight, bias, *found[1:], groups, relu)
    # Without a ReLU the gradient of the residual is dy itself
    return _agree(found, (y, mean, rstd)) and _agree(back[:3], gradients[:3])


def _frozen_bn_agrees(
    shape: tuple[int, ...], layout: torch.memory_format, relu: bool, device: torch.device
) -> bool:
    from .kernels import frozen_bn

    x, residual, dy = (_values(shape, i).to(memory_format=layout) for i in range(3))
    weight, bias, mean, variance = (_values(shape[1:2], i) for i in range(3, 7))
    variance = variance.square() + 0.5
    y = eager.frozen_bn(x, weight, bias, mean, variance, residual, EPS, relu)
    mask = y if relu else None
    gradient = eager.frozen_bn_backward(dy, mask, weight, variance, EPS, True)[0]
    given = _on(device, x, weight, bias, mean, variance, residual, dy)
    x, weight, bias, mean, variance, residual, dy = given
    found = frozen_bn.forward(x, weight, bias, mean, variance, residual, EPS, relu)
    mask = found if relu else None
    back = frozen_bn.backward(dy, mask, weight, variance, EPS, True)[0]
    return _agree([found, back], [y, gradient])


def _values(shape: tuple[int, ...], start: int) -> Tensor:
    """Values between -1 and 1 in float64, which differ everywhere and need no random generator."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, dtype=torch.float64).mul(1.7).sin().view(shape)


def _on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device, torch.float32) for tensor in tensors]


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = ((one.double().cpu(), two) for one, two in zip(found, wanted, strict=True))
    # NaN compares as false
    return all(
        bool(((one - two).abs() <= TOLERANCE * (1 + two.abs().max())).all()) for one, two in pairs
    )
