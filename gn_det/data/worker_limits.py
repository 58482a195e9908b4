"""What the system allows the worker processes of a data loader."""

import errno
import logging
import os
import shutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SHARED_MEMORY = "/dev/shm"
# Bytes of shared memory that batches of large images with bitmasks may take in all workers
ENOUGH = 1 << 30
# Below this many bytes, no worker process can be started
LEAST = 1 << 20
# Open files that shared batches may take in all workers
FILES = 1024
# Reading fails with these for reasons other than the file
EXHAUSTED = {
    errno.EMFILE: "raise the limit with `ulimit -n`, or use a smaller DATALOADER.NUM_WORKERS",
    errno.ENFILE: "close other programs, or use a smaller DATALOADER.NUM_WORKERS",
    errno.ENOMEM: "use a smaller DATALOADER.NUM_WORKERS",
}


def usable_workers(wanted: int) -> int:
    """The number of worker processes that can be started: `wanted`, or 0 with a warning."""
    if wanted and _free_shared_memory() < LEAST:
        logging.getLogger(__name__).warning(
            f"{SHARED_MEMORY} is full, so images are loaded without worker processes: free it, or "
            "give a container more with --shm-size"
        )
        return 0
    return wanted


def can_share_batches() -> bool:
    """Whether workers can pass tensors in shared memory, which takes memory and open files.

    Containers often have 64 MB of shared memory. A full one kills workers, and a limit on open
    files stops them silently. The limit is raised as far as this process may.
    """
    return _free_shared_memory() >= ENOUGH and _raise_file_limit() >= FILES


def sharing_workers(wanted: int) -> int:
    """The number of worker processes of a loader that can only share batches."""
    return wanted if can_share_batches() else 0


def _free_shared_memory() -> int:
    """Bytes that are free in shared memory; `ENOUGH` on systems without a limit of its own."""
    if not os.path.isdir(SHARED_MEMORY):
        return ENOUGH
    return shutil.disk_usage(SHARED_MEMORY).free


def _raise_file_limit() -> int:
    """Allow this process as many open files as it may have, and return that number."""
    if resource is None:
        return FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return FILES
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft
    return wanted
