"""Progress of everything that takes longer than a few seconds."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
# Seconds between two lines where the output is not a terminal
INTERVAL = 10.0


def progress(items: Iterable[T], title: str, total: int, done: int = 0) -> Iterator[T]:
    """Iterate over `items` and show how far it is: a bar on a terminal, log lines elsewhere.

    Args:
        items: the items that are left.
        title: what is done, such as "reading images".
        total: number of all items.
        done: number of items that were done before.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, title, total, initial=done, leave=False, file=sys.stderr)
        return
    last = time.monotonic()
    for number, item in enumerate(items, done + 1):
        yield item
        if number < total and time.monotonic() - last >= INTERVAL:
            last = time.monotonic()
            logging.getLogger(__name__).info(f"{title}: {number:,} of {total:,}")
