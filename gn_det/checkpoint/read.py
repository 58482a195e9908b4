"""Reading weights of every format without running anything that a file brings along."""

import argparse
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError

# Where trainers keep the weights, beside optimizer and counters
NESTS = ("model", "state_dict", "model_state_dict", "model_state", "blobs")
_WITHOUT_NAMES = "it holds no tensors by name"
# How deep in a file networks are looked for
_DEPTH = 4
# How files of `torch.save` begin that are no zip archives (PyTorch before 1.6)
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"

# What readers raise on files that are no weights, or that somebody has damaged
BROKEN = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError, SystemError, pickle.UnpicklingError),
    *(struct.error, zipfile.BadZipFile, zlib.error, safetensors.SafetensorError),
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
    networks = dict(_networks(content))
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
        keys = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
        raise InputError(f"{path} cannot be read as weights: {_WITHOUT_NAMES}, but {keys}")
    tensors = {name: _tensor(value, name, path, device) for name, value in found.items()}
    others = {k: len(v) for k, v in networks.items() if place is not None and k != place}
    return WeightsFile(tensors, facts, str(content.get("__author__", "")), others)


def _networks(
    content: Mapping[Any, Any], place: str = "", depth: int = _DEPTH
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of names to tensors, by the keys that lead there; "" for the whole file."""
    names = {k.decode(errors="replace") if isinstance(k, bytes) else k: content[k] for k in content}
    if tensors := {k: v for k, v in names.items() if isinstance(k, str) and is_tensor(v)}:
        yield place, tensors
    for key, value in names.items():
        # What an optimizer keeps stands under numbers
        if isinstance(key, str) and isinstance(value, Mapping) and depth:
            yield from _networks(value, f"{place}.{key}" if place else key, depth - 1)


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
    with path.open("rb") as file:
        begin = file.read(16)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            arrays = all(name.endswith(".npy") for name in archive.namelist())
            # PyTorch compares no checksums
            if device != "meta" and (damaged := archive.testzip()):
                raise zipfile.BadZipFile(f"its part {damaged} is damaged")
        if arrays:
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
    elif begin.startswith(b"PK"):
        raise zipfile.BadZipFile("it is cut off: copy or download it again")
    if path.suffix == ".safetensors" or begin[8:10] == b'{"':
        return load_file(path)
    if zipfile.is_zipfile(path) or begin.startswith(_OLD_TORCH):
        # The scripts of torchvision and timm keep their command line and scores beside the weights
        with torch.serialization.safe_globals([argparse.Namespace, *_arrays()]):
            return torch.load(path, map_location=device, weights_only=True)
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


def _arrays() -> list[Any]:
    """What NumPy's arrays and scalars are pickled by, under its old name and its new one."""
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
    parts = [
        (_ARRAY_PARTS[name], f"numpy.{core}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ]
    return [*parts, np.ndarray, np.dtype, *kinds]


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor, or an array that becomes one."""
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    )


def _tensor(value: Any, name: str, path: Path, device: str) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
        raise InputError(
            f"{path} cannot be read as weights: {name} is quantised, complex or sparse: save the "
            "network as it was before that"
        )
    return tensor.to(device)


def _reason(error: Exception) -> str:
    """What went wrong, in a few words; PyTorch takes a page for it, and advises to run the file."""
    text = str(error)
    alone = "save the model's state_dict by itself"
    if asked := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it asks for {asked[1]}, which is no tensor: {alone}"
    if "TorchScript" in text:
        return f"it is a TorchScript program: {alone}"
    if "weights_only" in text or "persistent id" in text:
        return f"it holds more than tensors and plain values: {alone}"
    return text.partition("\n")[0] or type(error).__name__


# What pickled arrays are built with; NumPy has kept the names, but in modules that move
_ARRAY_PARTS = {
    "_reconstruct": np.empty(0).__reduce__()[0],
    "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
    "scalar": np.float32(0).__reduce__()[0],
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in _ARRAY_PARTS:
            return _ARRAY_PARTS[name]
        if (module, name) == ("_codecs", "encode"):
            return _encode  # how older pickles hold bytes
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # In PyTorch's words, which `_reason` knows
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
