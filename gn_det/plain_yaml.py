"""YAML that holds plain values, however hostile it is: no code, no bombs, no hanging."""

from typing import Any

import yaml

from .errors import InputError

# What YAML and Detectron2 raise for configs that make no sense, and files that are none
CONFIG_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, yaml.YAMLError),
)
MAX_BYTES = 2**20  # of a text, and of what it holds with its aliases written out
NODE_BYTES = 10  # what a value counts at least, so that there are about 100,000
MAX_TEXT = 10_000  # characters of a value: Detectron2 parses each as Python, which gets slow
MAX_DEPTH = 50


def parse_yaml(text: str, name: str, trusted: bool) -> dict[str, Any]:
    """The values in a YAML text.

    Args:
        name: of the file, for messages.
        trusted: whether its tags may run code.

    Raises:
        InputError: for a text that is not valid, is too large, or would run code.
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
                    f"{name} would run code, at line {line}: write its values out"
                ) from None
    except RecursionError:
        raise InputError(f"{name} is nested too deeply") from None
    except InputError:
        raise
    except CONFIG_ERRORS as error:
        raise InputError(f"{name} is not valid YAML: {in_words(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{name} is not a config: it must hold KEY: value lines")
    return values


def refuse_large(value: object, name: str) -> None:
    """Refuse a YAML node or Python value that is too large, or contains itself.

    A few aliases of aliases stand for more than any memory holds.

    Args:
        name: of the file, for messages.

    Raises:
        InputError: for such a value.
    """
    _measure(value, name, {})


def in_words(error: BaseException) -> str:
    """An error's message on one line, the middle of a very long one left out."""
    if isinstance(error, MemoryError | RecursionError):
        return "a value in it is nested too deeply"
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 600 else f"{words[:300]} ... {words[-300:]}"


Measures = dict[int, tuple[int, int] | None]


def _measure(value: object, name: str, known: Measures) -> tuple[int, int]:
    """Size and depth of a YAML node or Python value, with all aliases in it written out.

    Args:
        known: what has been measured, None while it is.
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
            raise InputError(f"{name} is too large with its aliases written out")
        if depth > MAX_DEPTH:
            raise InputError(f"{name} is nested too deeply")
        known[id(value)] = size, depth
    if (found := known[id(value)]) is None:
        raise InputError(f"{name} has an alias that stands for something it is part of")
    return found


def _parts(value: Any) -> list[Any]:
    if isinstance(value, yaml.MappingNode | dict):
        pairs = value.items() if isinstance(value, dict) else value.value
        return [part for pair in pairs for part in pair]
    if isinstance(value, yaml.SequenceNode):
        return value.value
    return list(value) if isinstance(value, list | tuple | set) else []
