"""Calls in a child process, which detect crashes, hangs and excessive use of memory."""

import contextlib
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

# Limits of a call: time, and bytes of memory in addition to those at the start
SECONDS, MEMORY = 30, 3 * 2**30


def calls(work: Callable[[int], str], count: int) -> Iterator[tuple[int, str]]:
    """Call `work` with each number below `count`.

    Args:
        work: returns a description of a failure, or "".
        count: number of calls.

    Yields:
        each number with the failure; this can be a traceback, a signal or a hang.
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
                failure = receiver.recv() if alive else f"no result after {SECONDS} s"
            except EOFError:
                child.join()
                alive, failure = False, f"the process ends with exit code {child.exitcode}"
            yield done, failure
            done += 1
        child.kill()
        child.join()
        receiver.close()


def _serve(work: Callable[[int], str], numbers: range, sender: Connection) -> None:
    """Call `work` in the child process, with limited memory."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    for number in numbers:
        try:
            failure = work(number)
        except BaseException:
            failure = traceback.format_exc()
        with contextlib.suppress(BrokenPipeError):
            sender.send(failure)
