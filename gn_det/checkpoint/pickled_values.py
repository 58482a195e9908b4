"""The values in a pickle of weights, built by functions that check their arguments.

A pickle names the functions that it wants called. The names below are all that are known here, and
each stands for a function of this file. NumPy's own `dtype` and `scalar` would believe any
argument, and read memory at an address that the file gives.
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

# Kinds of NumPy's dtypes: bool, integers, floats and complex numbers
NUMBERS = "biufc"
NO_NUMBERS = "an array in it does not hold numbers"
DAMAGED = "its pickle is damaged"
# A file may take this many times its own size in memory, and this many bytes in any case
MAX_GROWTH = 8
ALWAYS_ALLOWED = 2**26
# Python's hash of an integer is its remainder: larger keys could all be made to collide
_MAX_KEY = 2**60
_MAX_DIMENSIONS = 32
_BYTES_PER_ELEMENT = 64


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to, and the function that stands for it, if any."""

    name: str
    build: Callable[..., Any] | None = None


@dataclass
class Dtype:
    """A NumPy dtype that is being read: kind, size in bytes, then the byte order."""

    kind: str
    size: int
    order: str = "="

    def get(self) -> np.dtype:
        return np.dtype(f"{self.order}{self.kind}{self.size}")


@dataclass
class Budget:
    """The memory in bytes that the content of a file may still take.

    Args:
        file_size: in bytes.
    """

    file_size: int
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = MAX_GROWTH * self.file_size + ALWAYS_ALLOWED

    def spend(self, count: int) -> None:
        """Take `count` bytes.

        Raises:
            pickle.UnpicklingError: if so many are not left.
        """
        self.left -= count
        if self.left < 0:
            raise pickle.UnpicklingError(
                f"its content would take more than {MAX_GROWTH} times the size of the file"
            )


def numpy_and_python_names(budget: Budget) -> dict[str, Any]:
    """The functions for NumPy's arrays and Python's containers, by "module.name"."""
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
    """Build a value by a `Global`; nothing else is ever called.

    Raises:
        pickle.UnpicklingError: for another function.
    """
    if type(function) is not Global or function.build is None or type(arguments) is not tuple:
        raise pickle.UnpicklingError("its pickle calls something that is no known function")
    return function.build(*arguments)


def set_state(value: Any, state: Any, budget: Budget) -> None:
    """Complete a value that was built without its content.

    Raises:
        pickle.UnpicklingError: for values that need no such thing.
    """
    if type(value) is np.ndarray:
        *_, shape, dtype, fortran, raw = state
        raw, numbers, shape = _numbers(budget, raw, dtype, shape)
        value.__setstate__((1, shape, numbers, bool(fortran), raw))  # type: ignore[arg-type]
    elif type(value) is Dtype:
        value.order = _byte_order(state)
    elif type(value) is OrderedDict:
        _set_metadata(value, state)
    elif type(value) is not argparse.Namespace:  # whose values nobody reads
        raise pickle.UnpicklingError("its pickle sets attributes")


def key_of(value: Any) -> Any:
    """A key of a dict or an element of a set, whose hash a file cannot make slow.

    Raises:
        pickle.UnpicklingError: for any other value.
    """
    if type(value) is tuple and len(value) <= 8 and all(type(part) is str for part in value):
        return value
    if type(value) in (str, bytes, bool, type(None)):
        return value
    if type(value) is int and abs(value) < _MAX_KEY:
        return value
    raise pickle.UnpicklingError("its pickle has keys that are neither names nor numbers")


def pairs(values: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn.

    Raises:
        pickle.UnpicklingError: for a key without a value, or of another kind than `key_of` takes.
    """
    if len(values) % 2:
        raise pickle.UnpicklingError(DAMAGED)
    return {key_of(k): v for k, v in zip(values[::2], values[1::2], strict=True)}


def shape_of(value: Any) -> tuple[int, ...]:
    """A tuple or list of whole numbers from 0 on, as a tuple.

    Raises:
        pickle.UnpicklingError: for anything else.
    """
    if type(value) in (tuple, list) and len(value) <= _MAX_DIMENSIONS:
        sizes = tuple(value)
        if all(type(size) is int and 0 <= size < 2**62 for size in sizes):
            return sizes
    raise pickle.UnpicklingError("a tensor in it has no valid shape")


def _dtype(code: Any, *_: Any) -> Dtype:
    text = code.decode("latin-1") if type(code) is bytes else code
    found = re.fullmatch(rf"([{NUMBERS}])(\d{{1,2}})", text) if type(text) is str else None
    if found is None:
        raise pickle.UnpicklingError(NO_NUMBERS)
    dtype = Dtype(found[1], int(found[2]))
    dtype.get()
    return dtype


def _byte_order(state: Any) -> str:
    order = state[1] if type(state) is tuple and len(state) > 1 else None
    order = order.decode("latin-1") if type(order) is bytes else order
    # The rest is for structures and arrays of arrays
    if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
        raise pickle.UnpicklingError(NO_NUMBERS)
    return order


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    if type(kind) is not Global or kind.name != "numpy.ndarray" or shape != (0,):
        raise pickle.UnpicklingError("an array in it is not of NumPy's own kind")
    return np.empty(0, np.int8)


def _numbers(
    budget: Budget, raw: Any, dtype: Any, shape: Any
) -> tuple[bytes, np.dtype, tuple[int, ...]]:
    """The parts of an array, once they are known to fit each other."""
    if type(dtype) is not Dtype:
        raise pickle.UnpicklingError(NO_NUMBERS)
    raw, numbers, shape = _raw(raw), dtype.get(), shape_of(shape)
    if prod(shape) * numbers.itemsize != len(raw):
        raise pickle.UnpicklingError("an array in it has another size than its bytes")
    budget.spend(len(raw))
    # PyTorch takes arrays of this machine's byte order alone
    native = numbers.newbyteorder("=")
    if native != numbers:
        raw = np.frombuffer(raw, numbers).astype(native).tobytes()
    return raw, native, shape


def _raw(value: Any) -> bytes:
    """Bytes, which Python 2 pickled as text."""
    if type(value) is str:
        return value.encode("latin-1")
    if type(value) not in (bytes, bytearray):
        raise pickle.UnpicklingError(NO_NUMBERS)
    return bytes(value)


def _scalar(budget: Budget, dtype: Any, raw: Any) -> Any:
    raw, numbers, _ = _numbers(budget, raw, dtype, ())
    return np.frombuffer(raw, numbers)[0]


def _frombuffer(budget: Budget, raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    raw, numbers, shape = _numbers(budget, raw, dtype, shape)
    array = np.frombuffer(bytearray(raw), numbers)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _encode(budget: Budget, text: Any, encoding: Any = None) -> bytes:
    """Bytes, as protocols before 3 write them."""
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
    """Set what PyTorch keeps beside a state_dict: versions by the names of modules."""
    metadata = state.get("_metadata") if type(state) is dict else None
    if isinstance(metadata, dict) and all(
        type(k) is str and type(v) is dict and all(type(n) is int for n in v.values())
        for k, v in metadata.items()
    ):
        value._metadata = metadata  # type: ignore[attr-defined]
