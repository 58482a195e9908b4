"""Activations that are recomputed in the backward pass instead of saved.

A convolution saves its input, which a norm computed from a tensor that is saved as well. Inside
`recompute_activations` it saves a `Recomputation` of that input instead. The backward pass then
computes the input again in one elementwise pass, with the same bits.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_inside = threading.local()


@contextmanager
def recompute_activations(enabled: bool = True) -> Iterator[None]:
    """Let operations in this context save the `Recomputation` of a tensor instead of the tensor.

    Inside `torch.utils.checkpoint` this does nothing: PyTorch runs only the innermost hooks, and
    the checkpoint's own hooks save more memory.
    """
    if not enabled or _has_hooks():
        yield
        return
    outer = is_recomputing()
    _inside.now = True
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _inside.now = outer


def _has_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_recomputing() -> bool:
    """Whether `recompute_activations` is on in this thread."""
    return getattr(_inside, "now", False)


class Recomputation:
    """A deferred recomputation of a tensor, which keeps its latest result until it is taken.

    Args:
        compute: returns the tensor.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._latest: Tensor | None = None

    def __call__(self) -> Tensor:
        self._latest = self._compute()
        return self._latest

    def take(self) -> Tensor | None:
        """The latest result, or None. It is not kept any longer."""
        latest, self._latest = self._latest, None
        return latest


def attach(y: Tensor, recomputation: Recomputation) -> None:
    """Attach a recomputation to y. It is ignored once y is changed in place."""
    y._recomputation = y._version, recomputation  # type: ignore[attr-defined]


def _pack(tensor: Tensor) -> Tensor | Recomputation:
    version, recomputation = getattr(tensor, "_recomputation", (None, None))
    if recomputation is not None and version == tensor._version:
        return recomputation
    # Detached, since an operation that saves its own result would keep its graph alive
    return tensor.detach()


def _unpack(saved: Tensor | Recomputation) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()
