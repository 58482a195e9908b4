"""Functions that build the values in a pickle of weights, and check their arguments.

A pickle refers to functions by name. Only the names in this file are allowed, and each stands for
a replacement defined here. NumPy's own `dtype` and `scalar` do not check their arguments: with
them, a file could read memory at an address of its choice.
"""

import argparse
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np

# NumPy's codes of the allowed dtypes: bool, integers, floats and complex numbers
NUMBERS = "biufc"
NOT_NUMERIC = "one of its arrays does not hold numbers"
DAMAGED = "its pickle is damaged"
# Memory limit of a file: this multiple of its size, plus this number of bytes
MAX_GROWTH = 8
ALWAYS_ALLOWED = 2**26
# Python hashes an integer modulo 2**61 - 1, so larger keys could be chosen to collide
_MAX_KEY = 2**60
_MAX_DIMENSIONS = 32
_BYTES_PER_ELEMENT = 64


@dataclass(frozen=True)
class Global:
    """A name that a pickle may refer to, and its replacement function, if it can be called."""

    name: str
    build: Callable[..., Any] | None = None


@dataclass
class Dtype:
    """A NumPy dtype while it is read: kind and size in bytes first, then the byte order."""

    kind: str
    size: int
    order: str = "="

    def get(self) -> np.dtype:
        return np.dtype(f"{self.order}{self.kind}{self.size}")


@dataclass
class Budget:
    """The memory, in bytes, that the content of a file may still use.

    Args:
        file_size: size of the file in bytes.
    """

    file_size: int
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = MAX_GROWTH * self.file_size + ALWAYS_ALLOWED

    def spend(self, count: int) -> None:
        """Subtract `count` bytes.

        Raises:
            pickle.UnpicklingError: if fewer bytes are left.
        """
        self.left -= count
        if self.left < 0:
            raise pickle.UnpicklingError(
                f"its content would need more than {MAX_GROWTH} times the size of the file"
            )


def numpy_and_python_names(budget: Budget) -> dict[str, Any]:
    """The replacements for NumPy's arrays and Python's containers, by "module.name"."""
    functions: dict[str, Callable[..., Any] | None] = {
        "numpy.dtype": _dtype,
        "numpy.ndarray": None,
        "numpy.core.multiarray.scalar": partial(_scalar, budget),
        "numpy.core.multiarray._reconstruct": _reconstruct,
        "numpy.core.numeric._frombuffer": partial(_frombuffer, budget),
        "_codecs.encode": partial(_encode, budget),
        "collections.OrderedDict": partial(_ordered, budget),
        "collections.defaultdict": lambda factory=None: {},
        "collections.Counter": partial(_counter, budget),
        "builtins.bytes": lambda: b"",
        "builtins.dict": lambda: {},
        "builtins.list": lambda: [],
        "builtins.set": partial(_set, budget),
        "builtins.bytearray": partial(_bytearray, budget),
        "builtins.complex": lambda real, imaginary: complex(real, imaginary),
        "argparse.Namespace": lambda: argparse.Namespace(),
    }
    return {name: Global(name, function) for name, function in functions.items()}


def call(function: Any, arguments: Any) -> Any:
    """Call the replacement function of a `Global`.

    Raises:
        pickle.UnpicklingError: if `function` is not a `Global` that can be called.
    """
    if type(function) is not Global or function.build is None or type(arguments) is not tuple:
        raise pickle.UnpicklingError("its pickle calls an unknown function")
    return function.build(*arguments)


def set_state(value: Any, state: Any, budget: Budget) -> None:
    """Set the content of a value that was built without it, as `__setstate__` does.

    Raises:
        pickle.UnpicklingError: if the value's type has no such state.
    """
    if type(value) is np.ndarray:
        *_, shape, dtype, fortran, raw = state
        raw, numbers, shape = _numbers(budget, raw, dtype, shape)
        value.__setstate__((1, shape, numbers, bool(fortran), raw))  # type: ignore[arg-type]
    elif type(value) is Dtype:
        value.order = _byte_order(state)
    elif type(value) is OrderedDict:
        _set_metadata(value, state)
    elif type(value) is not argparse.Namespace:  # its attributes are not needed
        raise pickle.UnpicklingError("its pickle sets attributes")


def key_of(value: Any) -> Any:
    """Return a dict key or set element, after checking that its hash is fast to compute.

    Raises:
        pickle.UnpicklingError: if it is not text, bytes, None, a bool, an integer below 2**60 or
            a short tuple of texts.
    """
    if type(value) is tuple and len(value) <= 8 and all(type(part) is str for part in value):
        return value
    if type(value) in (str, bytes, bool, type(None)):
        return value
    if type(value) is int and abs(value) < _MAX_KEY:
        return value
    raise pickle.UnpicklingError("its pickle has keys that are neither names nor numbers")


def pairs(values: list[Any]) -> dict[Any, Any]:
    """A dict from a flat list of alternating keys and values.

    Raises:
        pickle.UnpicklingError: if a value is missing, or `key_of` rejects a key.
    """
    if len(values) % 2:
        raise pickle.UnpicklingError(DAMAGED)
    return {key_of(k): v for k, v in zip(values[::2], values[1::2], strict=True)}


def shape_of(value: Any) -> tuple[int, ...]:
    """A shape as a tuple of integers.

    Raises:
        pickle.UnpicklingError: if it is not a tuple or list of integers of at least 0.
    """
    if type(value) in (tuple, list) and len(value) <= _MAX_DIMENSIONS:
        sizes = tuple(value)
        if all(type(size) is int and 0 <= size < 2**62 for size in sizes):
            return sizes
    raise pickle.UnpicklingError("one of its tensors has an invalid shape")


def _dtype(code: Any, *_: Any) -> Dtype:
    text = code.decode("latin-1") if type(code) is bytes else code
    match = re.fullmatch(rf"([{NUMBERS}])(\d{{1,2}})", text) if type(text) is str else None
    if match is None:
        raise pickle.UnpicklingError(NOT_NUMERIC)
    dtype = Dtype(match[1], int(match[2]))
    dtype.get()  # raises for sizes that NumPy does not have
    return dtype


def _byte_order(state: Any) -> str:
    order = state[1] if type(state) is tuple and len(state) > 1 else None
    order = order.decode("latin-1") if type(order) is bytes else order
    # The other entries describe structured dtypes and subarrays
    if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
        raise pickle.UnpicklingError(NOT_NUMERIC)
    return order


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    if type(kind) is not Global or kind.name != "numpy.ndarray" or shape != (0,):
        raise pickle.UnpicklingError("one of its arrays is not a numpy.ndarray")
    return np.empty(0, np.int8)


def _numbers(
    budget: Budget, raw: Any, dtype: Any, shape: Any
) -> tuple[bytes, np.dtype, tuple[int, ...]]:
    """Check that bytes, dtype and shape of an array agree, and convert to native byte order."""
    if type(dtype) is not Dtype:
        raise pickle.UnpicklingError(NOT_NUMERIC)
    raw, numbers, shape = _raw(raw), dtype.get(), shape_of(shape)
    if prod(shape) * numbers.itemsize != len(raw):
        raise pickle.UnpicklingError("one of its arrays does not have the size of its shape")
    budget.spend(len(raw))
    # PyTorch accepts only the byte order of the machine
    native = numbers.newbyteorder("=")
    if native != numbers:
        raw = np.frombuffer(raw, numbers).astype(native).tobytes()
    return raw, native, shape


def _raw(value: Any) -> bytes:
    """Bytes; Python 2 pickled them as text."""
    if type(value) is str:
        return value.encode("latin-1")
    if type(value) not in (bytes, bytearray):
        raise pickle.UnpicklingError(NOT_NUMERIC)
    return bytes(value)


def _scalar(budget: Budget, dtype: Any, raw: Any) -> Any:
    raw, numbers, _ = _numbers(budget, raw, dtype, ())
    return np.frombuffer(raw, numbers)[0]


def _frombuffer(budget: Budget, raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    raw, numbers, shape = _numbers(budget, raw, dtype, shape)
    array = np.frombuffer(bytearray(raw), numbers)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _encode(budget: Budget, text: Any, encoding: Any = None) -> bytes:
    """Replacement for `codecs.encode`, with which protocols before 3 write bytes."""
    raw = _raw(text)
    budget.spend(len(raw))
    return raw


def _bytearray(budget: Budget, raw: Any = b"", *_: Any) -> bytearray:
    return bytearray(_encode(budget, raw))


def _ordered(budget: Budget, items: Any = ()) -> OrderedDict:
    budget.spend(_BYTES_PER_ELEMENT * len(items))
    return OrderedDict(pairs([part for key, value in items for part in (key, value)]))


def _counter(budget: Budget, counts: Any = None) -> Counter:
    if type(counts) not in (dict, type(None)):
        raise pickle.UnpicklingError(DAMAGED)
    budget.spend(_BYTES_PER_ELEMENT * len(counts or ()))
    return Counter(counts)


def _set(budget: Budget, values: Any = ()) -> set:
    budget.spend(_BYTES_PER_ELEMENT * len(values))
    return set(map(key_of, values))


def _set_metadata(value: OrderedDict, state: Any) -> None:
    """Set `_metadata` of a state_dict: module name -> {"version": int}."""
    metadata = state.get("_metadata") if type(state) is dict else None
    if isinstance(metadata, dict) and all(
        type(k) is str and type(v) is dict and all(type(n) is int for n in v.values())
        for k, v in metadata.items()
    ):
        value._metadata = metadata  # type: ignore[attr-defined]
