"""Reading of weights in all formats, without running code from the file."""

import errno
import math
import os
import pickle
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError
from .pickled_values import NUMBERS, Budget
from .torch_file import LEGACY, read_archive, read_legacy
from .unpickle import Unpickler

# Keys of the weights in checkpoints that also hold optimizer state and counters
WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "blobs")
_NO_TENSORS = "it has no named tensors"
# Limits of the search for networks in a file: nesting depth, names, characters in a name
_DEPTH = 4
_MAX_NAMES = 200_000
_MAX_LENGTH = 500

# Version 3.0 is omitted: only structured arrays with non-ASCII field names need it
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

# Exceptions that the readers raise for damaged or unsupported files
READ_ERRORS = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError, SystemError, pickle.UnpicklingError),
    *(struct.error, zipfile.BadZipFile, zlib.error, safetensors.SafetensorError),
    *(NotImplementedError, SyntaxError, tokenize.TokenError),
)


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file and its metadata."""

    # Name -> tensor
    tensors: dict[str, Tensor]
    # Config keys that gn_det recorded in the file; not yet validated
    facts: dict[str, Any] = field(default_factory=dict)
    # `__author__` of files in Detectron2's format
    author: str = ""
    # Place of other networks, such as averaged weights -> number of tensors
    others: dict[str, int] = field(default_factory=dict)


def read_weights(path: Path, device: str = "cpu") -> WeightsFile:
    """Read a `.pth`, `.pkl`, `.npz` or `.safetensors` file.

    The content determines the format, except for files that end in .safetensors. Only tensors,
    arrays and plain values are created, so a file cannot run code.

    Args:
        path: the file.
        device: "cpu", or "meta" to read only names, shapes and dtypes.

    Raises:
        InputError: if the file cannot be read or has no named tensors.
    """
    content = read_content(path, device)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} cannot be read as weights: {_NO_TENSORS}")
    record = content.get("gn_det")
    facts = dict(record) if isinstance(record, Mapping) else {}
    try:
        networks = dict(_networks(content))
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} cannot be read as weights: {error}") from None
    place = next((key for key in (*WEIGHT_KEYS, "") if key in networks), None)
    if place is None:
        # All networks, with their places as prefixes; the caller has to choose one
        values = {
            f"{key}.{name}": tensor
            for key, tensors in networks.items()
            for name, tensor in tensors.items()
        }
    else:
        values = networks[place]
    if not values:
        keys = ", ".join(repr(key)[:50] for key in list(content)[:8]) or "none"
        raise InputError(
            f"{path} cannot be read as weights: {_NO_TENSORS}, and its keys are {keys}"
        )
    tensors = {name: _tensor(value, name, path, device) for name, value in values.items()}
    others = {k: len(v) for k, v in networks.items() if place is not None and k != place}
    author = content.get("__author__")
    return WeightsFile(tensors, facts, author if isinstance(author, str) else "", others)


def _networks(content: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each mapping of names to tensors with its place; the place is "" at the top level."""
    left, waiting = _MAX_NAMES, [("", content, _DEPTH)]
    while waiting:
        place, mapping, depth = waiting.pop()
        left -= len(mapping)
        if left < 0:
            raise pickle.UnpicklingError(f"it has more than {_MAX_NAMES:,} names")
        names = {_name(key): value for key, value in mapping.items()}
        if tensors := {k: v for k, v in names.items() if k is not None and is_tensor(v)}:
            yield place, tensors
        waiting += [
            (f"{place}.{key}" if place else key, value, depth - 1)
            for key, value in reversed(names.items())
            if key is not None and isinstance(value, Mapping) and depth
        ]


def _name(key: Any) -> str | None:
    """A key as text; None for other keys, such as the numbers in optimizer state."""
    name = key.decode(errors="replace") if isinstance(key, bytes) else key
    if not isinstance(name, str):
        return None
    if len(name) > _MAX_LENGTH or not name.isprintable():
        raise pickle.UnpicklingError(f"it has the invalid name {name[:50]!r}")
    return name


def read_content(path: Path, device: str = "cpu") -> Any:
    """Read the complete content of a file of weights; see `read_weights`.

    Raises:
        InputError: if the file cannot be read or contains other objects than tensors, arrays and
            plain values.
    """
    try:
        return _read(path, device)
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read as weights: {_reason(error)}") from None


def _read(path: Path, device: str) -> Any:
    # Opening a pipe would block, and a device may be endless
    if not path.is_file():
        if path.exists():
            raise OSError("it is not a regular file")
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    budget = Budget(path.stat().st_size)
    with path.open("rb") as file:
        begin = file.read(64)
    for start, reason in NO_WEIGHTS.items():
        if begin.lstrip().lower().startswith(start):
            raise OSError(reason)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _read_zip(archive, budget, device)
    if begin.startswith(b"PK"):
        raise zipfile.BadZipFile("it is truncated: copy or download it again")
    if path.suffix == ".safetensors" or begin[8:10] == b'{"':
        return load_file(path)
    # In memory, reads cannot allocate more than the file holds, whatever lengths it claims
    content = BytesIO(path.read_bytes())
    if begin.startswith(LEGACY):
        return read_legacy(content, budget, device)
    return Unpickler(content, budget).load()


# First bytes of files that a failed download leaves -> what they are, and the fix
NO_WEIGHTS = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file: run `git lfs pull`",
    b"<!doctype html": "it is a web page, not the file: download it again",
    b"<html": "it is a web page, not the file: download it again",
}


# Others decompress without a limit in Python's zipfile
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def _read_zip(archive: zipfile.ZipFile, budget: Budget, device: str) -> Any:
    """Read an archive of `torch.save` or `numpy.savez`."""
    # A compressed archive can expand to thousands of times its size
    budget.spend(sum(info.file_size for info in archive.infolist()))
    if any(info.compress_type not in _COMPRESSION for info in archive.infolist()):
        raise zipfile.BadZipFile("its compression is neither that of PyTorch nor that of NumPy")
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise zipfile.BadZipFile("it is a TorchScript program: save only the model's state_dict")
    try:
        if all(name.endswith(".npy") for name in names):
            arrays = {name.removesuffix(".npy"): _read_npy(archive, name, device) for name in names}
            return {name: array for name, array in arrays.items() if array is not None}
        return read_archive(archive, budget, device)
    except zipfile.BadZipFile as error:
        raise zipfile.BadZipFile(f"it is damaged: {error}") from None


def _read_npy(archive: zipfile.ZipFile, name: str, device: str) -> np.ndarray | Tensor | None:
    """Read an array of numbers; None for text. On the meta device only its shape and dtype."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"its array {name} has version {version[0]} of NumPy's format")
        shape, fortran, dtype = _NPY_HEADERS[version](file)
        if dtype.kind in "SU":
            return None
        if dtype.kind not in NUMBERS:
            raise ValueError(f"its array {name} does not hold numbers")
        if math.prod(shape) * dtype.itemsize != archive.getinfo(name).file_size - file.tell():
            raise ValueError(f"its array {name} does not have the size of its shape")
        if device == "meta":
            empty = torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
            return empty.new_empty(shape, device="meta")
        size = math.prod(shape) * dtype.itemsize
        array = np.frombuffer(bytearray(file.read(size)), dtype)
        # PyTorch accepts only the byte order of the machine
        native = array.astype(dtype.newbyteorder("="), copy=False)
        return native.reshape(shape, order="F" if fortran else "C")


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor, or an array that can be converted to one."""
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    )


def _tensor(value: Any, name: str, path: Path, device: str) -> Tensor:
    """Convert a tensor or array to a dense tensor on `device`."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(value)
    except TypeError as error:
        raise InputError(f"{path} cannot be read as weights: {name}: {_reason(error)}") from None
    if tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
        raise InputError(
            f"{path} cannot be read as weights: {name} is quantised, complex or sparse: save it as "
            "a dense tensor of real numbers"
        )
    return tensor.to(device)


def _reason(error: Exception) -> str:
    """The first line of an error message, or the name of its class."""
    reason = str(error).partition("\n")[0]
    return reason if reason.isprintable() and reason else type(error).__name__
