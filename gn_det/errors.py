"""Errors in the user's input end the program with one sentence and no traceback."""

import os
import reprlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NO_DETECTRON2 = (
    "gn_det needs Detectron2: install its official main, "
    "https://github.com/facebookresearch/detectron2, or run tools/install_detectron2.py"
)


class InputError(ValueError):
    """An error in the user's input; the message names the key or file, and the fix.

    Args:
        reason: one sentence that says what is wrong.
        key: full name of the config key that causes it, as "MODEL.RESNETS.NORM".
        fix: what the user can do about it; the message is `reason`, then "; " and `fix`.
    """

    def __init__(self, reason: str = "", *, key: str = "", fix: str = "") -> None:
        super().__init__(f"{reason}; {fix}" if fix else reason)
        self.reason, self.key, self.fix = reason, key, fix


def printable(value: object, limit: int = 200) -> str:
    r"""Make a value from an untrusted file safe to print, as one short line.

    Control characters are escaped, since they could forge lines or control the terminal.

    Args:
        value: strings and numbers are shown in full up to `limit`, other types are abbreviated.
        limit: maximum number of characters before escaping.

    Returns:
        a string without control characters, such as ``\x1b[0m`` for an escape sequence.
    """
    if not isinstance(value, str):
        # `str` fails on deeply nested lists and is slow on large ones
        value = str(value) if isinstance(value, int | float) else reprlib.repr(value)
    shown = value if len(value) <= limit else f"{value[: limit - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Exit with the message and code 1 on `InputError`, and with code 130 on Ctrl-C.

    On SIGTERM, exit as `exit_on_sigterm` does. If the reader of the output has gone, as with
    `| head`, exit with code 141 and no message.
    """
    try:
        with exit_on_sigterm():
            yield
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Python flushes the output once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """On SIGTERM print why the program ends, and raise `SystemExit`, so that `finally` runs."""

    def leave(*_: object) -> None:
        print("stopped by SIGTERM", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)

    # Python allows signal handlers to be set in the main thread only
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
