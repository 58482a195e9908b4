"""Activations that are recomputed in the backward pass instead of saved.

A convolution saves its input for the backward pass. If a norm layer computed that input, its own
input is saved too, so the convolution's can be recomputed. Inside `recompute_activations` the
convolution saves a `Recomputation` instead. The backward pass then recomputes the tensor in one
elementwise pass, with the same bits.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_state = threading.local()
# Older PyTorch cannot tell: there, a checkpoint around the context saves less memory
_top_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)


@contextmanager
def recompute_activations(enabled: bool = True) -> Iterator[None]:
    """Within this context, operations save the `Recomputation` of a tensor instead of the tensor.

    Tensors without a `Recomputation` are saved as usual. Inside `torch.utils.checkpoint` this does
    nothing: PyTorch runs only the innermost hooks, and the checkpoint's own hooks save more memory.
    Under torch.compile it does nothing either, since the compiler chooses what to recompute.

    Args:
        enabled: False makes this context do nothing.

    Raises:
        RuntimeError: in the backward pass, if a saved tensor has been modified in place.
    """
    if not enabled or torch.compiler.is_compiling() or _has_hooks():
        yield
        return
    outer = is_recomputing()
    _state.active = True
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _state.active = outer


def _has_hooks() -> bool:
    return _top_hooks(True) is not None


def is_recomputing() -> bool:
    """Whether `recompute_activations` is on in this thread."""
    return getattr(_state, "active", False)


class Saved:
    """A tensor that is saved for the backward pass, with PyTorch's check of its version."""

    def __init__(self, tensor: Tensor) -> None:
        # An operation that saves its own result would otherwise keep its graph alive
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def __call__(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(self._tensor.shape)}"
            )
        return self._tensor


class Recomputation:
    """A deferred recomputation of a tensor. It keeps its latest result until `take` is called.

    Args:
        compute: computes and returns the tensor from `inputs`.
        inputs: tensors that must not be modified before.
    """

    def __init__(self, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
        self._compute = compute
        self._inputs = [Saved(tensor) for tensor in inputs]
        self._latest: Tensor | None = None

    @property
    def inputs(self) -> list[Tensor]:
        """The inputs, checked like saved tensors."""
        return [saved() for saved in self._inputs]

    def __call__(self) -> Tensor:
        self._latest = self._compute(*self.inputs)
        return self._latest

    def take(self) -> Tensor | None:
        """Return the latest result, or None, and release it."""
        latest, self._latest = self._latest, None
        return latest


def attach(y: Tensor, recomputation: Recomputation) -> None:
    """Attach a recomputation to y. It is ignored once y has been modified in place."""
    y._recomputation = y._version, recomputation  # type: ignore[attr-defined]


def _pack(tensor: Tensor) -> Callable[[], Tensor]:
    if recomputation := _recomputation_of(tensor):
        return recomputation
    # Such as the flattened output of a head's last convolution
    if tensor._is_view() and (recomputation := _recomputation_of(tensor._base)):
        view = tensor.size(), tensor.stride(), tensor.storage_offset()
        return lambda: recomputation().as_strided(*view)
    return Saved(tensor)


def _recomputation_of(tensor: Tensor | None) -> Recomputation | None:
    """The recomputation that is attached to a tensor, unless that has been modified in place."""
    version, recomputation = getattr(tensor, "_recomputation", (None, None))
    if tensor is None or recomputation is None or version != tensor._version:
        return None
    return recomputation


def _unpack(saved: Callable[[], Tensor]) -> Tensor:
    return saved()
