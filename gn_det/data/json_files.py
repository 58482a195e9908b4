"""JSON files that come from others."""

import json
from pathlib import Path
from typing import Any

from ..errors import InputError, printable
from ..files import read_regular

# A few times as large as the largest public sets of masks
MAX_BYTES = 8 << 30


def read_json(path: Path, encoding: str = "utf-8-sig") -> Any:
    """The content of a JSON file.

    Args:
        encoding: the default reads UTF-8 with or without a byte order mark.

    Raises:
        InputError: if it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_regular(path, MAX_BYTES).decode(encoding))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {printable(str(error))}") from None
    except RecursionError:
        raise InputError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except MemoryError:
        raise InputError(f"{path} is larger than this machine's memory: divide it") from None
