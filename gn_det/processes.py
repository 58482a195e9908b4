"""Processes that end with the process that started them, and which processes exist."""

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
        parent: process ID of the parent; defaults to that of the current parent.
    """
    starter = multiprocessing.parent_process()
    expected = os.getppid() if parent is None else parent

    def watch() -> None:
        # The children of a process that has ended get another parent. A fork server is the parent
        # of all processes that it forks, so these look at the one that asked for them, too
        while os.getppid() == expected and (starter is None or starter.is_alive()):
            time.sleep(INTERVAL)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.name == "posix":
        threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def is_running(process: int) -> bool:
    """Whether a process exists on this machine.

    Args:
        process: its ID.
    """
    if os.name != "posix":
        return True  # on Windows, os.kill ends the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to another user
    return True
