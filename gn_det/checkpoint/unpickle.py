"""An unpickler that runs no code from the file.

Python's unpickler imports and calls any function that a file names. This one interprets the same
instructions, but looks names up only in a fixed table; see `pickled_values`.
"""

import codecs
import pickle
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

from .pickled_values import (
    DAMAGED,
    Budget,
    call,
    key_of,
    numpy_and_python_names,
    pairs,
    set_state,
)

# A checkpoint with optimizer state has about 100,000
_MAX_INSTRUCTIONS = 10_000_000
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_DICTS = (dict, OrderedDict, Counter)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
_IGNORED = frozenset(("PROTO", "FRAME", "READONLY_BUFFER"))


class Unpickler:
    """Reads one pickle.

    Args:
        file: must be in memory, so that a read cannot allocate more than the file holds.
        budget: memory limit for the file.
        names: values by "module.name", in addition to those of NumPy and Python's containers.
        persistent_load: called with a reference to a value outside the pickle; returns the value.
    """

    def __init__(
        self,
        file: IO[bytes],
        budget: Budget,
        names: Mapping[str, Any] | None = None,
        persistent_load: Callable[[Any], Any] | None = None,
    ) -> None:
        self._file, self._budget = file, budget
        self._names = {**numpy_and_python_names(budget), **(names or {})}
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Read the pickle and return its value.

        Raises:
            pickle.UnpicklingError: if the pickle is damaged or contains an unknown name.
            ValueError, LookupError, TypeError, AttributeError: if the pickle is damaged.
        """
        for _ in range(_MAX_INSTRUCTIONS):
            name, argument = self._next()
            if name == "STOP":
                return self._pop()
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self._stack.append(argument)
            elif execute := getattr(self, f"_{name}", None):
                execute(argument)
            elif name not in _IGNORED:
                raise pickle.UnpicklingError(f"its pickle has the unsupported instruction {name}")
        raise pickle.UnpicklingError(f"its pickle has more than {_MAX_INSTRUCTIONS:,} instructions")

    def _next(self) -> tuple[str, Any]:
        opcode = _OPCODES.get(self._file.read(1))
        if opcode is None:
            raise pickle.UnpicklingError("its format is unknown")
        if opcode.name == "STRING":
            # Text of Python 2 can hold any bytes, which pickletools does not accept
            quoted = self._file.readline().strip()[1:-1]
            return opcode.name, codecs.escape_decode(quoted)[0].decode("latin-1")
        return opcode.name, opcode.arg.reader(self._file) if opcode.arg else None

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise pickle.UnpicklingError(DAMAGED)
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        place = self._marks.pop()
        values = self._stack[place:]
        del self._stack[place:]
        return values

    def _top(self, *kinds: type) -> Any:
        value = self._pop()
        if type(value) not in kinds:
            raise pickle.UnpicklingError(DAMAGED)
        self._stack.append(value)
        return value

    # The methods below execute the instruction of the same name in pickletools

    def _MARK(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _POP(self, _: None) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _POP_MARK(self, _: None) -> None:
        self._pop_mark()

    def _DUP(self, _: None) -> None:
        value = self._pop()
        self._stack += [value, value]

    def _EMPTY_LIST(self, _: None) -> None:
        self._stack.append([])

    def _EMPTY_DICT(self, _: None) -> None:
        self._stack.append({})

    def _EMPTY_SET(self, _: None) -> None:
        self._stack.append(set())

    def _TUPLE(self, _: None) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _TUPLE1(self, _: None) -> None:
        self._stack.append((self._pop(),))

    def _TUPLE2(self, _: None) -> None:
        last = self._pop()
        self._stack.append((self._pop(), last))

    def _TUPLE3(self, _: None) -> None:
        last, middle = self._pop(), self._pop()
        self._stack.append((self._pop(), middle, last))

    def _LIST(self, _: None) -> None:
        self._stack.append(self._pop_mark())

    def _DICT(self, _: None) -> None:
        self._stack.append(pairs(self._pop_mark()))

    def _FROZENSET(self, _: None) -> None:
        self._stack.append(frozenset(map(key_of, self._pop_mark())))

    def _APPEND(self, _: None) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _APPENDS(self, _: None) -> None:
        values = self._pop_mark()
        self._top(list).extend(values)

    def _SETITEM(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._top(*_DICTS)[key_of(key)] = value

    def _SETITEMS(self, _: None) -> None:
        values = pairs(self._pop_mark())
        mapping = self._top(*_DICTS)
        for key, value in values.items():  # `Counter.update` would add the counts
            mapping[key] = value

    def _ADDITEMS(self, _: None) -> None:
        values = self._pop_mark()
        self._top(set).update(map(key_of, values))

    def _PUT(self, place: int) -> None:
        value = self._pop()
        self._memo[place] = value
        self._stack.append(value)

    def _MEMOIZE(self, _: None) -> None:
        self._PUT(len(self._memo))

    def _GET(self, place: int) -> None:
        self._stack.append(self._memo[place])

    _BINPUT = _LONG_BINPUT = _PUT
    _BINGET = _LONG_BINGET = _GET

    def _GLOBAL(self, name: str) -> None:
        self._stack.append(self._find(name.replace(" ", ".", 1)))

    def _STACK_GLOBAL(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(self._find(f"{module:s}.{name:s}"))

    def _find(self, name: str) -> Any:
        # NumPy 2 and Python 2 use other names for these modules
        name = re.sub(r"^numpy\._core\.", "numpy.core.", name)
        name = re.sub(r"^__builtin__\.", "builtins.", name)
        if name not in self._names:
            raise pickle.UnpicklingError(
                f"it contains {name[:100]}, which is neither a tensor nor a plain value: save only "
                "the model's state_dict"
            )
        return self._names[name]

    def _REDUCE(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        self._stack.append(call(function, arguments))

    _NEWOBJ = _REDUCE

    def _BUILD(self, _: None) -> None:
        state, value = self._pop(), self._pop()
        set_state(value, state, self._budget)
        self._stack.append(value)

    def _BINPERSID(self, _: None) -> None:
        if self._persistent_load is None:
            raise pickle.UnpicklingError("its pickle refers to values outside the file")
        self._stack.append(self._persistent_load(self._pop()))
