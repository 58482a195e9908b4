"""Processes that end with the process that started them."""

import multiprocessing
import os
import signal
import threading
import time

# Seconds between two looks at the parent process
INTERVAL = 1.0


def end_with_parent(parent: int | None = None) -> None:
    """Kill this process soon after its parent has ended, however that ended.

    A killed parent cannot stop its children. Without this, they would keep its GPU, and write to
    the same folder as the next command.

    Args:
        parent: process ID of the parent; defaults to that of the process that started this one
            by `multiprocessing`, or else to the current parent's.
    """
    starter = multiprocessing.parent_process()
    # A parent that has ended already is not the current one
    expected = parent or (starter.pid if starter else None) or os.getppid()

    def watch() -> None:
        # The children of a process that has ended get another parent
        while os.getppid() == expected:
            time.sleep(INTERVAL)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.name == "posix":
        threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
