"""Reading weights of every format without running anything that a file brings along."""

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

# Where trainers keep the weights, beside optimizer and counters
NESTS = ("model", "state_dict", "model_state_dict", "model_state", "blobs")
_WITHOUT_NAMES = "it holds no tensors by name"
# How deep in a file networks are looked for, among how many names and how long ones
_DEPTH = 4
_MAX_NAMES = 200_000
_MAX_LENGTH = 500

# The third version is for structures whose fields have names beyond ASCII
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

# What readers raise on files that are no weights, or that somebody has damaged
BROKEN = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError, SystemError, pickle.UnpicklingError),
    *(struct.error, zipfile.BadZipFile, zlib.error, safetensors.SafetensorError),
    *(NotImplementedError, SyntaxError, tokenize.TokenError),
)


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file, by name, and the facts that gn_det wrote beside them, if it did."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    # Who says to have written it, in Detectron2's own format
    author: str = ""
    # How many tensors stand by name in other places, such as averages of the weights
    others: dict[str, int] = field(default_factory=dict)


def read_weights(path: Path, device: str = "cpu") -> WeightsFile:
    """Read a `.pth`, `.pkl`, `.npz` or `.safetensors` file; but for the last, its content tells.

    Nothing but tensors, arrays and plain values is built, whatever the file asks for.

    Args:
        device: "meta" for names, shapes and dtypes alone.

    Raises:
        InputError: if it cannot be read, or holds no tensors by name; the message names it.
    """
    content = read_content(path, device)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} cannot be read as weights: {_WITHOUT_NAMES}")
    written = content.get("gn_det")
    facts = dict(written) if isinstance(written, Mapping) else {}
    try:
        networks = dict(_networks(content))
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} cannot be read as weights: {error}") from None
    place = next((nest for nest in (*NESTS, "") if nest in networks), None)
    if place is None:
        # Under names of their own: which of them is meant, whoever takes them has to tell
        found = {
            f"{nest}.{name}": tensor
            for nest, tensors in networks.items()
            for name, tensor in tensors.items()
        }
    else:
        found = networks[place]
    if not found:
        keys = ", ".join(repr(key)[:50] for key in list(content)[:8]) or "nothing"
        raise InputError(f"{path} cannot be read as weights: {_WITHOUT_NAMES}, but {keys}")
    tensors = {name: _tensor(value, name, path, device) for name, value in found.items()}
    others = {k: len(v) for k, v in networks.items() if place is not None and k != place}
    author = content.get("__author__")
    return WeightsFile(tensors, facts, author if isinstance(author, str) else "", others)


def _networks(content: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of names to tensors, by the keys that lead there; "" for the whole file."""
    left, waiting = _MAX_NAMES, [("", content, _DEPTH)]
    while waiting:
        place, mapping, depth = waiting.pop()
        left -= len(mapping)
        if left < 0:
            raise pickle.UnpicklingError("it has too many names")
        names = {_name(key): value for key, value in mapping.items()}
        if tensors := {k: v for k, v in names.items() if k is not None and is_tensor(v)}:
            yield place, tensors
        waiting += [
            (f"{place}.{key}" if place else key, value, depth - 1)
            for key, value in reversed(names.items())
            if key is not None and isinstance(value, Mapping) and depth
        ]


def _name(key: Any) -> str | None:
    """A key as a name, None for the numbers that optimizers keep their state under."""
    name = key.decode(errors="replace") if isinstance(key, bytes) else key
    if not isinstance(name, str):
        return None
    if len(name) > _MAX_LENGTH or not name.isprintable():
        raise pickle.UnpicklingError(f"it has the name {name[:50]!r}")
    return name


def read_content(path: Path, device: str = "cpu") -> Any:
    """All that a file of weights holds, as `read_weights` reads it.

    Raises:
        InputError: if it cannot be read, or asks for more than tensors, arrays and plain values.
    """
    try:
        return _read(path, device)
    except BROKEN as error:
        raise InputError(f"{path} cannot be read as weights: {_reason(error)}") from None


def _read(path: Path, device: str) -> Any:
    # Before it is opened: a pipe would be waited for, and a device has no end
    if not path.is_file():
        if path.exists():
            raise OSError("it is no regular file")
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    budget = Budget(path.stat().st_size)
    with path.open("rb") as file:
        begin = file.read(16)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _read_zip(archive, budget, device)
    if begin.startswith(b"PK"):
        raise zipfile.BadZipFile("it is cut off: copy or download it again")
    if path.suffix == ".safetensors" or begin[8:10] == b'{"':
        return load_file(path)
    # In memory no length that the file claims can be taken for what it has
    content = BytesIO(path.read_bytes())
    if begin.startswith(LEGACY):
        return read_legacy(content, budget, device)
    return Unpickler(content, budget).load()


def _read_zip(archive: zipfile.ZipFile, budget: Budget, device: str) -> Any:
    """The content of an archive of `torch.save` or of `numpy.savez`."""
    # Compressed archives may unpack to thousands of times their size
    budget.spend(sum(info.file_size for info in archive.infolist()))
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise zipfile.BadZipFile(
            "it is a TorchScript program: save the model's state_dict by itself"
        )
    try:
        if all(name.endswith(".npy") for name in names):
            arrays = {name.removesuffix(".npy"): _read_npy(archive, name, device) for name in names}
            return {name: array for name, array in arrays.items() if array is not None}
        return read_archive(archive, budget, device)
    except zipfile.BadZipFile as error:
        raise zipfile.BadZipFile(f"a part of it is damaged: {error}") from None


def _read_npy(archive: zipfile.ZipFile, name: str, device: str) -> np.ndarray | Tensor | None:
    """An array of numbers, or None for one of text; one without content on the meta device."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"its array {name} is of version {version[0]} of NumPy's format")
        shape, fortran, dtype = _NPY_HEADERS[version](file)
        if dtype.kind in "SU":
            return None
        if dtype.kind not in NUMBERS:
            raise ValueError(f"its array {name} does not hold numbers")
        if math.prod(shape) * dtype.itemsize != archive.getinfo(name).file_size - file.tell():
            raise ValueError(f"its array {name} has another size than its bytes")
        if device == "meta":
            empty = torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
            return empty.new_empty(shape, device="meta")
        array = np.frombuffer(bytearray(file.read()), dtype)
        # PyTorch takes arrays of this machine's byte order alone
        native = array.astype(dtype.newbyteorder("="), copy=False)
        return native.reshape(shape, order="F" if fortran else "C")


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor, or an array that becomes one."""
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    )


def _tensor(value: Any, name: str, path: Path, device: str) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(value)
    except TypeError as error:
        raise InputError(f"{path} cannot be read as weights: {name}: {_reason(error)}") from None
    if tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
        raise InputError(
            f"{path} cannot be read as weights: {name} is quantised, complex or sparse: save the "
            "network as it was before that"
        )
    return tensor.to(device)


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    reason = str(error).partition("\n")[0]
    return reason if reason.isprintable() and reason else type(error).__name__
