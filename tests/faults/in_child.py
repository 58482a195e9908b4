"""Calls in a process of their own, where a crash, a hang or too much memory is seen as such."""

import contextlib
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

# A reader may take so long, and so many bytes more than there were before
SECONDS, MEMORY = 30, 3 * 2**30


def calls(work: Callable[[int], str], count: int) -> Iterator[tuple[int, str]]:
    """Call `work` with the numbers below `count`.

    Args:
        work: returns what was lost, "" for nothing.

    Yields:
        each number with what was lost, a traceback, a signal or a hang included.
    """
    context = get_context("fork")
    done = 0
    while done < count:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_serve, args=(work, range(done, count), sender))
        child.start()
        sender.close()
        alive = True
        while alive and done < count:
            try:
                alive = receiver.poll(SECONDS)
                lost = receiver.recv() if alive else f"it hangs for {SECONDS} s"
            except EOFError:
                child.join()
                alive, lost = False, f"the process ends with {child.exitcode}"
            yield done, lost
            done += 1
        child.kill()
        child.join()
        receiver.close()


def _serve(work: Callable[[int], str], numbers: range, sender: Connection) -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    for number in numbers:
        try:
            lost = work(number)
        except BaseException:
            lost = traceback.format_exc()
        with contextlib.suppress(BrokenPipeError):
            sender.send(lost)
