"""How a mistake in what the user gave ends: one sentence, exit code not 0, no traceback."""

import reprlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager

NO_DETECTRON2 = (
    "gn_det needs Detectron2: install its official main, "
    "https://github.com/facebookresearch/detectron2, or run tools/install_detectron2.py"
)


class InputError(ValueError):
    """What the user gave cannot work; the message names the key or file, and the mend."""


def printable(value: object, limit: int = 200) -> str:
    """A value that came with someone's data, safe to print: one short line, nothing hidden in it.

    Control characters, which could forge lines or steer a terminal, are escaped.

    Args:
        value: texts and numbers are printed as they are, all else in a few characters.
        limit: of characters.
    """
    if not isinstance(value, str):
        # Lists may be nested deeper, and be larger, than `str` can take
        value = str(value) if isinstance(value, int | float) else reprlib.repr(value)
    shown = value if len(value) <= limit else f"{value[: limit - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an `InputError` into its sentence and exit code 1, and Ctrl-C into exit code 130."""
    try:
        yield
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `SystemExit` in the main thread, so that what was begun is put in order."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
