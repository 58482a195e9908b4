"""Safe parsing of untrusted YAML: no code, no memory exhaustion, no endless loops."""

from typing import Any

import yaml

from .errors import InputError

# Exceptions of YAML and Detectron2 for invalid configs and unreadable files
CONFIG_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, yaml.YAMLError),
)
MAX_BYTES = 2**20  # of a YAML text, and of its values with all aliases expanded
NODE_BYTES = 10  # smallest size counted for a value, which limits them to about 100,000
MAX_TEXT = 10_000  # characters of a value; Detectron2 parses each as Python, which is slow
MAX_DEPTH = 50


def parse_yaml(text: str, name: str, trusted: bool) -> dict[str, Any]:
    """Parse a YAML text that must be a mapping.

    Args:
        text: the content of the file.
        name: how error messages refer to the file.
        trusted: whether its tags may run code.

    Returns:
        the top-level mapping.

    Raises:
        InputError: for a text that is invalid, is too large, or would run code.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        refuse_large(node, name)
        try:
            values = loader.construct_document(node) if node else None
        except yaml.constructor.ConstructorError as error:
            if trusted:
                values = yaml.unsafe_load(text)
            elif "tag:yaml.org,2002:python/" not in str(error.problem):
                raise
            else:
                line = error.problem_mark.line + 1
                raise InputError(
                    f"{name} would run code in line {line}: replace the tag with plain values"
                ) from None
    except RecursionError:
        raise InputError(f"{name} is nested too deeply") from None
    except InputError:
        raise
    except CONFIG_ERRORS as error:
        raise InputError(f"{name} is not valid YAML: {describe_error(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{name} is not a config: it must contain KEY: value lines")
    return values


def refuse_large(value: object, name: str) -> None:
    """Refuse a value that is too large with its aliases expanded, or that contains itself.

    A few nested aliases can expand to more than any memory can hold.

    Args:
        value: a YAML node or a Python value.
        name: how error messages refer to the file.

    Raises:
        InputError: for such a value.
    """
    _measure(value, name, {})


def describe_error(error: BaseException) -> str:
    """The message of an exception on one line; long messages are shortened in the middle."""
    if isinstance(error, MemoryError | RecursionError):
        return "a value in it is nested too deeply"
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 600 else f"{words[:300]} ... {words[-300:]}"


Measures = dict[int, tuple[int, int] | None]


def _measure(value: object, name: str, known: Measures) -> tuple[int, int]:
    """Measure a YAML node or Python value with all aliases expanded.

    Args:
        value: the node or value.
        name: how error messages refer to the file.
        known: results by `id`; None while a value is being measured, to detect cycles.

    Returns:
        size in characters, and depth of nesting.
    """
    if id(value) not in known:
        known[id(value)] = None
        text = value.value if isinstance(value, yaml.ScalarNode) else value
        length = len(text) if isinstance(text, str) else 0
        if length > MAX_TEXT:
            raise InputError(f"{name} has a value of more than {MAX_TEXT} characters")
        parts = [_measure(part, name, known) for part in _parts(value)]
        size = NODE_BYTES + length + sum(size for size, _ in parts)
        depth = 1 + max((depth for _, depth in parts), default=0)
        if size > MAX_BYTES:
            raise InputError(f"{name} is too large with its aliases expanded")
        if depth > MAX_DEPTH:
            raise InputError(f"{name} is nested too deeply")
        known[id(value)] = size, depth
    if (measured := known[id(value)]) is None:
        raise InputError(f"{name} has an alias that contains itself")
    return measured


def _parts(value: Any) -> list[Any]:
    """Keys and values of a mapping, elements of a sequence, else nothing."""
    if isinstance(value, yaml.MappingNode | dict):
        pairs = value.items() if isinstance(value, dict) else value.value
        return [part for pair in pairs for part in pair]
    if isinstance(value, yaml.SequenceNode):
        return value.value
    return list(value) if isinstance(value, list | tuple | set) else []
