"""What is noticed in a data set, and what is done about it."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import InputError, printable

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """What was noticed, how often, where first, what follows, and whether it stops a training."""

    what: str
    count: int
    examples: tuple[str, ...]
    then: str
    stops: bool

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count:,} {self.what} ({', '.join(self.examples)}{more}): {self.then}"


class Findings:
    """Findings in the making: every `add` counts one case of what it names."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, bool]] = Counter()
        self._examples: dict[tuple[str, str, bool], list[str]] = defaultdict(list)

    def add(self, what: str, example: object, then: str, stops: bool = False) -> None:
        """Count one case.

        Args:
            what: a plural, as "pictures without objects".
            example: what the case is known by: a file name, an id; it is made `printable`.
            then: what is done about it, or, where it stops, the fix.
        """
        self._counts[what, then, stops] += 1
        examples = self._examples[what, then, stops]
        if len(examples) < NUM_EXAMPLES:
            examples.append(printable(example))

    def __iter__(self) -> Iterator[Finding]:
        """What stops first, then by number of cases."""
        cases = self._counts.items()
        for case, count in sorted(cases, key=lambda c: (not c[0][2], -c[1])):
            what, then, stops = case
            yield Finding(what, count, tuple(self._examples[case]), then, stops)


def refuse(findings: dict[str, list[Finding]]) -> None:
    """Raise what stops a training, all of it.

    Args:
        findings: by the name of the data set, as "train".

    Raises:
        InputError: if there is any.
    """
    lines = [f"{name}: {f}" for name, found in findings.items() for f in found if f.stops]
    if lines:
        raise InputError("\n  - ".join(["the data would train or measure wrongly", *lines]))
