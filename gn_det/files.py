"""Atomic writes, folder locks, and reads limited to regular files."""

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from .errors import InputError
from .processes import is_running


@contextmanager
def write_whole(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file atomically: it replaces `path` only when the block ends without an error.

    If the block raises, an existing file at `path` stays unchanged. The content is synced to the
    disk before the replacement, so that a power failure cannot leave an empty file.

    Args:
        path: the final path of the file.
        mode: "w" for UTF-8 text, "wb" for bytes.

    Yields:
        the open file, which has the name of `incomplete` until the block ends.

    Raises:
        OSError: if the file cannot be written.
    """
    final = Path(path)
    partial = incomplete(final)
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(final.parent)


def incomplete(path: Path) -> Path:
    """A short name beside `path` for an incomplete file or folder of this process.

    What ended processes have left there for the same `path` is removed.
    """
    digest = sha256(os.fsencode(path.name)).hexdigest()[:12]
    remove_abandoned(path.parent.glob(f".{digest}.[0-9]*.partial"))
    return path.with_name(f".{digest}.{os.getpid()}.partial")


# The names of `incomplete`
INCOMPLETE = f".{'[0-9a-f]' * 12}.[0-9]*.partial"


@contextmanager
def new_dataset(root: Path) -> Iterator[Path]:
    """Yield the path of a folder to fill, which becomes `root` once it is complete.

    Args:
        root: must not exist; its parents are created.

    Raises:
        InputError: if `root` exists already, or cannot be created.
    """
    if root.exists():
        raise InputError(f"{root} exists already: remove it, or choose another folder")
    partial = None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = incomplete(root)
        yield partial
        partial.rename(root)
    except OSError as error:
        reason = "it exists by now" if root.exists() else error.strerror
        raise InputError(f"cannot write the dataset to {root}: {reason}") from None
    finally:
        if partial is not None:
            remove(partial)


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove those files and folders named by `incomplete` whose process has ended."""
    for path in [*paths]:  # complete, before folders disappear
        process = path.name.split(".")[2]
        if not (process.isdecimal() and is_running(int(process))):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all its content; it may be missing."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# Seconds to wait for a lock: the children of a killed command end within one or two
LOCK_TIMEOUT = 4.0


@contextmanager
def locked(folder: Path, setting: str = "--output-dir") -> Iterator[None]:
    """Create a folder if needed, and lock it until the block or the process ends.

    Incomplete files of killed processes are removed from it.

    Args:
        folder: the folder, in which a file `.lock` remains.
        setting: the flag or key that sets the folder, for error messages.

    Raises:
        InputError: if another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=LOCK_TIMEOUT)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another command works in {folder}: wait until it ends, or choose another folder with "
            f"{setting}"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot write to {folder}: {reason}; choose another folder with {setting}"
        ) from None
    except NotImplementedError:
        pass  # some network file systems do not support locks
    remove_abandoned(folder.rglob(INCOMPLETE))
    try:
        yield
    finally:
        lock.release()


def open_regular(path: str | os.PathLike[str], limit: int) -> IO[bytes]:
    """Open a regular file for reading bytes; symbolic links are followed.

    Folders, FIFOs, sockets and devices are refused: reading them could block or never end.

    Args:
        path: the file to open.
        limit: maximum file size in bytes.

    Raises:
        OSError: if it cannot be opened, is larger than `limit`, or is not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return open(path, "rb")


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read all bytes of a regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path, limit) as file:
        # Some files in /proc report size 0 and never end
        return file.read(os.fstat(file.fileno()).st_size)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries to the disk, if the file system supports it."""
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
