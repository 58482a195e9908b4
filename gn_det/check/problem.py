"""What a mistake in a config is: its key and value, why it goes wrong, and the mend."""

from dataclasses import dataclass
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Problem:
    """A key, its value, why that goes wrong, and the mend."""

    key: str
    value: Any
    why: str
    mend: str

    def __str__(self) -> str:
        value = f'"{self.value}"' if isinstance(self.value, str) else self.value
        return f"{self.key} {value}: {self.why}; {self.mend}"


class ConfigError(InputError):
    """A config that cannot work as it is; `problems` has all that was found."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        lines = [str(problem) for problem in problems]
        head = [] if len(lines) == 1 else [f"{len(lines)} problems in the config"]
        super().__init__("\n  - ".join([*head, *lines]))
