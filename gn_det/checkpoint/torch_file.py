"""Reading of both `torch.save` formats with an unpickler that calls no functions of the file.

The sizes in a file are checked against the bytes it holds, for every version of PyTorch. For
tensors on the meta device the bytes are not read.
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

# First bytes of files in the format of PyTorch before 1.6, which are not zip archives
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_LEGACY_PICKLES = 3  # magic number, protocol and system information precede the content

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
    """The bytes that tensors are views of; `content` is None on the meta device."""

    dtype: torch.dtype
    nbytes: int
    content: bytearray | None


def read_archive(archive: zipfile.ZipFile, budget: Budget, device: str) -> Any:
    """Read a zip archive of `torch.save`.

    Args:
        archive: the opened file.
        budget: memory limit for the file.
        device: "cpu", or "meta" for tensors without content.

    Raises:
        pickle.UnpicklingError, ValueError, LookupError: if the file is damaged.
        zipfile.BadZipFile: if a checksum is wrong.
    """
    roots = {name.rpartition("/")[0] for name in archive.namelist() if _is_content(name)}
    if len(roots) != 1:
        raise pickle.UnpicklingError("it is a zip archive without weights")
    root = roots.pop()
    order = f"{root}/byteorder"
    if order in archive.namelist() and read_record(archive, order).decode() != sys.byteorder:
        raise pickle.UnpicklingError("it was written on a machine with another byte order")
    storages: dict[str, Storage] = {}

    def find(place: Any) -> Storage:
        kind, key, count = _parts(place, 5)
        if key not in storages:
            record, nbytes = f"{root}/data/{key}", count * kind.itemsize
            if archive.getinfo(record).file_size != nbytes:
                raise pickle.UnpicklingError(f"its record {record} has the wrong size")
            content = None if device == "meta" else bytearray(read_record(archive, record))
            storages[key] = Storage(kind, nbytes, content)
        return storages[key]

    pickled = BytesIO(read_record(archive, f"{root}/data.pkl"))
    return Unpickler(pickled, budget, _names(budget), find).load()


def read_record(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read one record of a zip archive, but no more bytes than its header claims.

    Raises:
        zipfile.BadZipFile: if it has another number of bytes, or a wrong checksum.
    """
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        # `ZipFile.read` would first decompress up to 2 GB, whatever the header claims
        content = file.read(size)
        if len(content) != size or file.read(1):
            raise zipfile.BadZipFile(f"the record {name} has the wrong size")
    return content


def _is_content(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


def read_legacy(file: IO[bytes], budget: Budget, device: str) -> Any:
    """Read a file in the format of PyTorch before 1.6; see `read_archive`."""
    *_, system = (Unpickler(file, budget).load() for _ in range(_LEGACY_PICKLES))
    if system["little_endian"] != (sys.byteorder == "little"):
        raise pickle.UnpicklingError("it was written on a machine with another byte order")
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
        raise pickle.UnpicklingError("some of its tensors are missing")
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count * storage.dtype.itemsize != storage.nbytes:
            raise pickle.UnpicklingError("one of its tensors has the wrong size")
        raw = file.read(storage.nbytes)
        if len(raw) != storage.nbytes:
            raise EOFError("it is truncated: copy or download it again")
        if storage.content is not None:
            storage.content[:] = raw
    return content


def _parts(place: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Dtype, key and number of elements of a storage that a pickle refers to."""
    if type(place) is tuple and place[:1] == ("module",):
        raise pickle.UnpicklingError("it contains a module: save only the model's state_dict")
    if type(place) is not tuple or len(place) != length or place[0] != "storage":
        raise pickle.UnpicklingError("one of its tensors has an invalid storage")
    _, kind, key, _, count = place[:5]
    known = type(kind) is torch.dtype and type(key) is str and type(count) is int
    if not known or count < 0 or any(part is not None for part in place[5:]):
        raise pickle.UnpicklingError("one of its tensors has an invalid storage")
    return kind, key, count


def _names(budget: Budget) -> dict[str, Any]:
    """The functions and values that `torch.save` refers to, by "module.name"."""
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
        "it has quantised, sparse or other special tensors: save them as dense tensors"
    )


def _rebuild(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> Tensor | None:
    """Replacement for PyTorch's function that builds a view of a typed storage."""
    return _view(budget, storage, storage.dtype, offset, size, stride)


def _rebuild_typed(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *more: Any
) -> Tensor | None:
    """The same for an untyped storage; the third element of `more` is the dtype."""
    return _view(budget, storage, more[2], offset, size, stride)


def _view(budget: Budget, storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """A view of a storage, after checking that all of its elements are inside the storage."""
    size, stride, (offset,) = shape_of(size), shape_of(stride), shape_of((offset,))
    if type(storage) is not Storage or type(dtype) is not torch.dtype or len(size) != len(stride):
        raise pickle.UnpicklingError("one of its tensors has an invalid storage")
    count = prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last + 1) * dtype.itemsize > storage.nbytes:
        raise pickle.UnpicklingError("one of its tensors exceeds its storage")
    # Strides of 0 make large tensors from few bytes, but copies of them need the full memory
    budget.spend(count * dtype.itemsize)
    if storage.content is None:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    if not count:
        return torch.empty(size, dtype=dtype)
    raw = torch.frombuffer(storage.content, dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), offset, size, stride)
