"""Runs of a study in parallel subprocesses."""

from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from typing import Any

from gn_det.processes import end_with_parent


def run_parallel(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], processes: int
) -> Iterator[Any]:
    """Call a function in subprocesses, and yield each result as soon as it is there.

    Args:
        function: a function of a module, which can be pickled.
        calls: the arguments of each call.
        processes: number of calls at the same time. Each call has a process of its own.

    Raises:
        Exception: the first one that a call raises. The other calls are then terminated.
    """
    with get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(_call, [(function, arguments) for arguments in calls])


def _call(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    end_with_parent()
    function, arguments = job
    return function(*arguments)
