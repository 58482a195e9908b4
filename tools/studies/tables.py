"""Markdown tables for the results of the tools and studies."""

import statistics
from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in GitHub-flavoured Markdown; it ends with a newline.

    Args:
        columns: the header.
        rows: the cells of each row, formatted as text.
    """
    return tabulate(rows, columns, tablefmt="github", disable_numparse=True) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Format mean ± standard deviation, with the number of seeds if it is not 3."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    note = "" if len(values) == 3 else f" ({len(values)} seed{'s' * (len(values) > 1)})"
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}{note}"
