"""Files that are on the disk whole, or not at all, and folders that one command works in."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

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
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, which is created if needed, until the block or the process ends.

    Raises:
        InputError: if another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another command works in {folder}: wait until it ends, or name another folder with "
            "--output-dir"
        ) from None
    except NotImplementedError:
        pass  # some network disks have no locks
    try:
        yield
    finally:
        lock.release()


def open_regular(path: str | os.PathLike[str], limit: int) -> IO[bytes]:
    """Open a file to read its bytes; links are followed.

    Args:
        limit: the largest size in bytes.

    Raises:
        OSError: if it cannot be opened, is larger, or is a folder, FIFO, socket or device, which
            could be waited for or read without end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return open(path, "rb")


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a file; see `open_regular`, whose errors it raises."""
    with open_regular(path, limit) as file:
        # Some files of the system say that they are empty, and never end
        return file.read(os.fstat(file.fileno()).st_size)


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
