"""How a mistake in what the user gave ends: one sentence, exit code not 0, no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot work; the message names the key or file, and the mend."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an `InputError` into its sentence and exit code 1, and Ctrl-C into exit code 130."""
    try:
        yield
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
