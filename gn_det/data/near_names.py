"""Suggest an existing file for a file name that does not exist."""

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

# Larger folders are not searched
MAX_FILES = 500_000


def near_name(folder: Path, name: str) -> str:
    """The file that a name probably means: with other slashes, case, Unicode form or folder.

    Args:
        folder: the image folder.
        name: a `file_name` that does not exist below it.

    Returns:
        the path of the file, relative to `folder`; "" if there is none or several.
    """
    index = _index(folder.resolve())
    plain = _plain(name)
    for key in (plain, plain.rpartition("/")[2]):
        if len(found := index.get(key, [])) == 1:
            return found[0]
    return ""


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


@lru_cache(maxsize=4)
def _index(folder: Path) -> dict[str, list[str]]:
    """Paths below a folder by their plain form, and by that of their last part."""
    index: dict[str, list[str]] = {}
    count = 0
    for root, _, files in os.walk(folder):
        for file in files:
            count += 1
            if count > MAX_FILES:
                return {}
            path = os.path.relpath(os.path.join(root, file), folder)
            plain = _plain(path)
            for key in {plain, plain.rpartition("/")[2]}:
                index.setdefault(key, []).append(path)
    return index
