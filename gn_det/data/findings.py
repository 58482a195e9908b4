"""Findings of the dataset checks: counted, printed in one line each, and raised if fatal."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import InputError, printable

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One kind of finding in a dataset, such as "images without objects".

    `str()` of it is one line, such as "2 empty boxes (17, 42): they are skipped".

    Args:
        description: a plural that names the kind.
        count: number of cases.
        examples: names or ids of the first cases, at most `NUM_EXAMPLES`.
        action: how gn_det handles the cases, or, if fatal, how the user can fix them.
        fatal: whether a training run must not start.
    """

    description: str
    count: int
    examples: tuple[str, ...]
    action: str
    fatal: bool

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        examples = ", ".join(self.examples)
        return f"{self.count:,} {self.description} ({examples}{more}): {self.action}"


class Findings:
    """A collector of findings: each call of `add` counts one case; iteration yields `Finding`s."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, bool]] = Counter()
        self._examples: dict[tuple[str, str, bool], list[str]] = defaultdict(list)

    def add(self, description: str, example: object, action: str, fatal: bool = False) -> None:
        """Count one case.

        Args:
            description: a plural that names the kind, such as "images without objects".
            example: name or id of the case; it is made `printable`.
            action: how gn_det handles the case, or, if fatal, how the user can fix it.
            fatal: whether a training run must not start.
        """
        self._counts[description, action, fatal] += 1
        examples = self._examples[description, action, fatal]
        if len(examples) < NUM_EXAMPLES:
            examples.append(printable(example))

    def __iter__(self) -> Iterator[Finding]:
        """Fatal findings first, then by decreasing number of cases."""
        kinds = self._counts.items()
        for kind, count in sorted(kinds, key=lambda item: (not item[0][2], -item[1])):
            description, action, fatal = kind
            yield Finding(description, count, tuple(self._examples[kind]), action, fatal)


def raise_if_fatal(findings: dict[str, list[Finding]]) -> None:
    """Raise one error that lists all fatal findings.

    Args:
        findings: the findings of each dataset, by its name, such as "train".

    Raises:
        InputError: if any finding is fatal.
    """
    lines = [f"{name}: {f}" for name, listed in findings.items() for f in listed if f.fatal]
    if lines:
        header = "these errors in the data would corrupt training or evaluation"
        raise InputError("\n  - ".join([header, *lines]))
