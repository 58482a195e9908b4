"""The result of converting a backbone, with an account of every tensor of the file."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ..errors import InputError
from .facts import Facts


@dataclass
class Conversion:
    """A backbone under Detectron2's names, and what became of each tensor of the file."""

    tensors: dict[str, Tensor]
    # Config of the backbone: architecture, norm, stride and pixel format
    cfg: CfgNode
    source: str
    # Name in the file -> why the tensor is dropped
    dropped: dict[str, str]
    # Detectron2's names of tensors that the file lacks or has in another shape
    missing: list[str]
    # Names in the file that match no tensor of the backbone
    unknown: list[str]
    # Detectron2's names of tensors that were created, because the file does not need them
    added: list[str]
    # Config keys that the file does not determine, with their usual values for the source
    assumed: Facts
    # Place of other networks in the file -> number of tensors
    others: dict[str, int]
    # Prefix of the network's names in the file
    prefix: str = ""
    # Config keys that fine-tuning should use
    recipe: dict[str, Any] = field(default_factory=dict)
    # Errors of the features after a conversion to GN, such as "res2 3%, res3 4%"
    errors: str = ""

    def summary(self) -> Iterator[str]:
        """Lines that count the tensors: taken, added, dropped, missing, unknown and ignored."""
        yield f"taken    {len(self.tensors) - len(self.added):4} tensors, source {self.source}"
        if self.added:
            yield f"added    {len(self.added):4} (mean 0, variance 1: BN is fused in this file)"
        yield f"dropped  {len(self.dropped):4}"
        for reason, count in Counter(self.dropped.values()).items():
            first = next(name for name, other in self.dropped.items() if other == reason)
            yield f"         {count:4} {reason}: {first}{', ...' * (count > 1)}"
        for title, names in (("missing", self.missing), ("unknown", self.unknown)):
            yield f"{title}  {len(names):4}" + "".join(f"\n              {n}" for n in names[:8])
        for place, count in self.others.items():
            yield f"ignored  {count:4} under {place or 'the top level'}"
        if self.assumed:
            keys = ", ".join(f"{key} {value}" for key, value in self.assumed.items())
            yield f"assumed  {keys} (usual for {self.source}; override with KEY VALUE)"

    def check_complete(self, missing: Sequence[str] = (), unknown: Sequence[str] = ()) -> None:
        """Check that every missing or unknown tensor is allowed.

        Args:
            missing, unknown: allowed names, or patterns of names such as "res5.*".

        Raises:
            InputError: naming the first tensor that is not allowed, and the flag to allow it.
        """
        for title, flag, names, allowed in (
            ("missing from the file", "--allow-missing", self.missing, missing),
            ("unknown to the backbone", "--allow-unknown", self.unknown, unknown),
        ):
            left = [n for n in names if not any(fnmatch(n.split(" ")[0], p) for p in allowed)]
            if left:
                # Such as the two encoders of MoCo
                beside = self.prefix and not all(name.startswith(self.prefix) for name in left)
                alone = f'take one network alone with --prefix "{self.prefix}", '
                raise InputError(
                    f"{len(left)} tensors are {title}, first {left[0]}: "
                    f"{alone if beside and flag == '--allow-unknown' else ''}give another file or "
                    f"--source, or allow them with {flag} NAME_OR_PATTERN"
                )
