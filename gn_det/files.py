"""Files that are on the disk whole, or not at all, and folders that one command works in."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import InputError


@contextmanager
def write_whole(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` at the end of the block, or never.

    What it replaces stays as it is until then, and stays for good when the block raises. After the
    block the content has been given to the disk, so that a power cut does not empty it.

    Args:
        mode: "w" for text in UTF-8, "wb" for bytes.

    Yields:
        the open file.
    """
    final = Path(path)
    partial = final.with_name(f"{final.name}.partial")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(final.parent)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder, which is made if need be, for this process, until the block or process ends.

    Raises:
        InputError: if another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Disks that know no locks are used without
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise InputError(
                    f"another command works in {folder}: wait for its end, or name another folder "
                    "with --output-dir"
                ) from None
        yield


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder last, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
