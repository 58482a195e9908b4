"""Read untrusted JSON files."""

import json
from pathlib import Path
from typing import Any

from ..errors import InputError, printable
from ..files import read_regular

# A few times the size of the largest public instance segmentation datasets
MAX_BYTES = 8 << 30


def read_json(path: Path, encoding: str = "utf-8-sig") -> Any:
    """Read a JSON file of at most `MAX_BYTES`.

    Args:
        path: the file.
        encoding: the default reads UTF-8 with or without a byte order mark.

    Raises:
        InputError: if it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_regular(path, MAX_BYTES).decode(encoding))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {printable(str(error))}") from None
    except RecursionError:
        raise InputError(f"{path} cannot be read: its JSON is nested too deeply") from None
    except MemoryError:
        raise InputError(f"{path} does not fit into memory: divide it into smaller files") from None
