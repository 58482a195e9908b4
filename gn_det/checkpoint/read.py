"""Reading weights of every format without running anything that a file brings along."""

import argparse
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
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


def read_weights(path: Path, device: str = "cpu") -> WeightsFile:
    """Read a `.pth`, `.pkl`, `.npz` or `.safetensors` file; but for the last, its content tells.

    Nothing but tensors, arrays and plain values is built, whatever the file asks for.

    Args:
        device: "meta" for names, shapes and dtypes alone.

    Raises:
        InputError: if it cannot be read, or holds no tensors by name; the message names it.
    """
    facts: dict[str, Any] = {}
    author = ""
    content = read_content(path, device)
    if isinstance(content, Mapping):
        author = str(content.get("__author__", ""))
        written = content.get("gn_det")
        facts = dict(written) if isinstance(written, Mapping) else {}
        for nest in NESTS:
            if isinstance(content.get(nest), Mapping):
                content = content[nest]
                break
        content = {k: _tensor(v, device) for k, v in content.items() if is_tensor(v)}
    if not content or not isinstance(content, dict):
        raise InputError(f"{path} cannot be read as weights: it holds no tensors by name")
    return WeightsFile(content, facts, author)


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
        if arrays:
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path) or begin.startswith(_OLD_TORCH):
        # The scripts of torchvision and timm keep their command line and scores beside the weights
        with torch.serialization.safe_globals([argparse.Namespace, *_scalars()]):
            return torch.load(path, map_location=device, weights_only=True)
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


def _scalars() -> list[Any]:
    """What NumPy's scalars are pickled by."""
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, bool)]
    return [_ARRAY_PARTS["scalar"], np.dtype, *kinds]


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor, or an array that becomes one."""
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    )


def _tensor(value: Any, device: str) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return tensor.to(device)


def _reason(error: Exception) -> str:
    """What went wrong, in a few words; PyTorch takes a page for it."""
    text = str(error)
    if asked := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it asks for {asked[1]}, which is no tensor"
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
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
