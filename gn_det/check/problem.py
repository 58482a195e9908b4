"""One problem in a config, and the exception that carries all of them."""

from dataclasses import dataclass
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Problem:
    """A config key whose value cannot work.

    Attributes:
        key: full name, as "MODEL.RESNETS.NORM".
        value: what the config sets it to.
        reason: why training or evaluation would go wrong.
        fix: what the user can do about it.
    """

    key: str
    value: Any
    reason: str
    fix: str

    def __str__(self) -> str:
        value = f'"{self.value}"' if isinstance(self.value, str) else self.value
        return f"{self.key} {value}: {self.reason}; {self.fix}"


class ConfigError(InputError):
    """A config with problems; the message lists all of them.

    Args:
        problems: at least one; kept in the attribute of the same name.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        lines = [str(problem) for problem in problems]
        head = [] if len(lines) == 1 else [f"{len(lines)} problems in the config"]
        super().__init__("\n  - ".join([*head, *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, pickle calls __init__ with the message
        return type(self), (self.problems,)
