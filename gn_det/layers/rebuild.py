"""Activations that are not kept for the backward pass, since their norm can give them again.

A convolution saves its input, which a norm has computed from something that is saved as well.
Inside `rebuilt_activations`, the convolution saves the recipe instead, and the input is computed
again when the gradient needs it: one elementwise pass, to the bit.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_inside = threading.local()


@contextmanager
def rebuilt_activations(enabled: bool = True) -> Iterator[None]:
    """Let no operation in this context save what `remember` has a recipe of.

    Inside a checkpoint it does nothing: PyTorch runs the innermost hooks alone, and the
    checkpoint's own save less.
    """
    if not enabled or _has_hooks():
        yield
        return
    outer = is_rebuilding()
    _inside.now = True
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _inside.now = outer


def _has_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_rebuilding() -> bool:
    """Whether `rebuilt_activations` is on in this thread."""
    return getattr(_inside, "now", False)


class Recipe:
    """How to have a tensor again; what was computed last can be taken once."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._latest: Tensor | None = None

    def __call__(self) -> Tensor:
        self._latest = self._compute()
        return self._latest

    def take(self) -> Tensor | None:
        """What was computed last, which is not kept any longer."""
        latest, self._latest = self._latest, None
        return latest


def remember(y: Tensor, recipe: Recipe) -> None:
    """Give y a recipe to have it again, which holds until y is changed in place."""
    y._recipe = y._version, recipe  # type: ignore[attr-defined]


def _pack(tensor: Tensor) -> Tensor | Recipe:
    version, recipe = getattr(tensor, "_recipe", (None, None))
    if recipe is not None and version == tensor._version:
        return recipe
    # An operation that saved its own result with its graph would keep itself alive
    return tensor.detach()


def _unpack(saved: Tensor | Recipe) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()
