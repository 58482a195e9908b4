"""What a forward pass leaves in memory for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of all that `forward` computes and that its result's graph keeps alive.

    Unlike saved-tensor hooks, of which PyTorch runs the innermost alone, it sees what is kept
    whatever hooks `forward` sets itself. It works on any device, and needs no allocator's help.
    """
    with _Outputs() as outputs:
        result = forward()
    own = result.untyped_storage().nbytes()
    return sum(size for storage, size in outputs.storages.values() if not storage.expired()) - own


class _Outputs(TorchDispatchMode):
    """Remembers the storage of every tensor that is computed, and keeps none alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            # A view of an input is nothing new
            if storage._cdata not in given:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return outputs


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
