"""The two formats of `torch.save`, read without an unpickler that calls functions.

Sizes that a file claims are compared with the bytes that are there, whatever the version of
PyTorch, and tensors on the meta device are described without reading their bytes.
"""

import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import prod
from typing import IO, Any

import torch
from torch import Tensor

from .pickled_values import Budget, Global, call, shape_of
from .unpickle import Unpickler

# How files begin that are no zip archives (PyTorch before 1.6)
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_LEGACY_PICKLES = 3  # magic number, protocol and system, before the content

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
_NUMBERS = r"torch\.(bool|bfloat16|u?int(8|16|32|64)|float(16|32|64|8_\w+)|complex(64|128))"
_DTYPES = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and re.fullmatch(_NUMBERS, str(value))
}
_OTHER_TENSORS = (
    *("_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_nested_tensor"),
    *("_rebuild_wrapper_subclass", "_rebuild_meta_tensor_no_storage"),
    "_rebuild_device_tensor_from_numpy",
)


@dataclass(frozen=True)
class Storage:
    """The bytes that tensors are views of; without `content` on the meta device."""

    dtype: torch.dtype
    nbytes: int
    content: bytearray | None


def read_archive(archive: zipfile.ZipFile, budget: Budget, device: str) -> Any:
    """The content of a zip archive of `torch.save`.

    Args:
        budget: of the file.
        device: "meta" for tensors without content, whose bytes stay unread.

    Raises:
        pickle.UnpicklingError, ValueError, LookupError: for a damaged file.
        zipfile.BadZipFile: for bytes that do not fit their checksum.
    """
    roots = {name.rpartition("/")[0] for name in archive.namelist() if _is_content(name)}
    if len(roots) != 1:
        raise pickle.UnpicklingError("it is a zip archive, but not one of weights")
    root = roots.pop()
    order = f"{root}/byteorder"
    if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
        raise pickle.UnpicklingError("it was written on a machine of another byte order")
    storages: dict[str, Storage] = {}

    def find(place: Any) -> Storage:
        kind, key, count = _parts(place, 5)
        if key not in storages:
            record, nbytes = f"{root}/data/{key}", count * kind.itemsize
            if archive.getinfo(record).file_size != nbytes:
                raise pickle.UnpicklingError(f"its record {record} has another size than it says")
            content = None if device == "meta" else bytearray(archive.read(record))
            storages[key] = Storage(kind, nbytes, content)
        return storages[key]

    pickled = BytesIO(archive.read(f"{root}/data.pkl"))
    return Unpickler(pickled, budget, _names(budget), find).load()


def _is_content(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


def read_legacy(file: IO[bytes], budget: Budget, device: str) -> Any:
    """The content of a file in the format of PyTorch before 1.6; see `read_archive`."""
    *_, system = (Unpickler(file, budget).load() for _ in range(_LEGACY_PICKLES))
    if system["little_endian"] != (sys.byteorder == "little"):
        raise pickle.UnpicklingError("it was written on a machine of another byte order")
    storages: dict[str, Storage] = {}

    def find(place: Any) -> Storage:
        kind, key, count = _parts(place, 6)
        if key not in storages:
            nbytes = count * kind.itemsize
            budget.spend(nbytes)
            storages[key] = Storage(kind, nbytes, None if device == "meta" else bytearray(nbytes))
        return storages[key]

    content = Unpickler(file, budget, _names(budget), find).load()
    keys = Unpickler(file, budget).load()
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise pickle.UnpicklingError("its tensors are not all there")
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count * storage.dtype.itemsize != storage.nbytes:
            raise pickle.UnpicklingError("a tensor in it has another size than it says")
        read = file.read(storage.nbytes)
        if len(read) != storage.nbytes:
            raise EOFError("it is cut off: copy or download it again")
        if storage.content is not None:
            storage.content[:] = read
    return content


def _parts(place: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Type, key and number of elements of a storage that a pickle refers to."""
    if type(place) is tuple and place[:1] == ("module",):
        raise pickle.UnpicklingError(
            "it contains a whole module: save the model's state_dict by itself"
        )
    if type(place) is not tuple or len(place) != length or place[0] != "storage":
        raise pickle.UnpicklingError("a tensor in it has no valid storage")
    _, kind, key, _, count = place[:5]
    known = type(kind) is torch.dtype and type(key) is str and type(count) is int
    if not known or count < 0 or any(part is not None for part in place[5:]):
        raise pickle.UnpicklingError("a tensor in it has no valid storage")
    return kind, key, count


def _names(budget: Budget) -> dict[str, Any]:
    """Functions and values by the names that `torch.save` writes."""
    functions: dict[str, Callable[..., Any] | None] = {
        "torch.Size": lambda sizes=(): shape_of(sizes),
        "torch.device": lambda kind, *_: kind if type(kind) is str else "",
        "torch.Tensor": None,
        "torch.nn.parameter.Parameter": None,
        "torch._utils._rebuild_tensor": partial(_rebuild, budget),
        "torch._utils._rebuild_tensor_v2": partial(_rebuild, budget),
        "torch._utils._rebuild_tensor_v3": partial(_rebuild_typed, budget),
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, *__: call(
            function, arguments
        ),
    }
    functions |= {f"torch._utils.{name}": _refuse for name in _OTHER_TENSORS}
    names: dict[str, Any] = {name: Global(name, build) for name, build in functions.items()}
    for kind, dtype in _STORAGES.items():
        for module in ("torch", "torch.cuda", "torch.storage"):
            names[f"{module}.{kind}Storage"] = dtype
    return names | _DTYPES


def _refuse(*_: Any) -> None:
    raise pickle.UnpicklingError(
        "it has quantised or sparse tensors: save the network as it was before that"
    )


def _rebuild(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> Tensor | None:
    """A view of a storage, all of whose elements lie inside it."""
    return _view(budget, storage, storage.dtype, offset, size, stride)


def _rebuild_typed(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *more: Any
) -> Tensor | None:
    """The same of an untyped storage, the third of `more` being its dtype."""
    return _view(budget, storage, more[2], offset, size, stride)


def _view(budget: Budget, storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    size, stride, (offset,) = shape_of(size), shape_of(stride), shape_of((offset,))
    if type(storage) is not Storage or type(dtype) is not torch.dtype or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor in it has no valid storage")
    count = prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last + 1) * dtype.itemsize > storage.nbytes:
        raise pickle.UnpicklingError("a tensor in it reaches past the end of its storage")
    # What is loaded into a model is as large as its shape says, whatever its strides are
    budget.spend(count * dtype.itemsize)
    if storage.content is None:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    if not count:
        return torch.empty(size, dtype=dtype)
    whole = torch.frombuffer(storage.content, dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(whole.untyped_storage(), offset, size, stride)
