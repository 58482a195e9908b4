"""Measure the memory that a forward pass saves for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that `forward` computes and its result's autograd graph keeps alive.

    This works on any device, and also if `forward` sets saved-tensor hooks itself. Measuring with
    such hooks would not, as PyTorch runs only the innermost ones.

    Args:
        forward: returns a tensor with an autograd graph; the tensor itself is not counted.
    """
    with _Outputs() as outputs:
        result = forward()
    own = result.untyped_storage().nbytes()
    return sum(size for storage, size in outputs.storages.values() if not storage.expired()) - own


class _Outputs(TorchDispatchMode):
    """Records weak references to the storages of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            # A view shares the storage of an input
            if storage._cdata not in inputs:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return outputs


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
