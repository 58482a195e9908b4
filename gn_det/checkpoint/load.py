"""Strict loading: every tensor of the model and of the file is accounted for, or training stops."""

import re
import shlex
from dataclasses import dataclass

from ..modeling.parts import PREDICTORS, SETTINGS, TRUNK, count_parts, part_of
from .names import CLASSIFIER, STEM_BIAS

# Start at 0 by design, and are in no file that was trained without them
DEFORMABLE = r"\.conv2_offset\."


@dataclass
class Loaded:
    """What became of each tensor of the model and of the file, by name."""

    model: list[str]
    # of the model, not in the file, and of those the ones that are there in another shape
    fresh: set[str]
    misshapen: set[str]
    # in the file, and not in the model
    unused: set[str]
    # "BN", "FrozenBN" or "GN", by the file's names, where they tell
    norm: str | None

    def block(self) -> str:
        """Lines for people: filled, kept at initialisation, and left in the file."""
        lines = [("filled", [n for n in self.model if n not in self.fresh])]
        lines += [("at initialisation", sorted(self.fresh)), ("not used", sorted(self.unused))]
        return "\n".join(
            f"  {title:17} {len(names):4} tensors: "
            + (", ".join(f"{part} {n}" for part, n in count_parts(names).items()) or "none")
            for title, names in lines
        )

    def norm_conflict(self) -> str | None:
        """Why the trunk's norm cannot take the file's, though Detectron2 might load it."""
        trunk = [name for name in self.model if part_of(name) in TRUNK]
        statistics = any(name.endswith("norm.running_mean") for name in trunk)
        if self.norm == "GN" and statistics:
            return "it was trained with Group Normalization, and this model has BatchNorm"
        has_norm = any(name.endswith("norm.weight") for name in trunk)
        if self.norm in ("BN", "FrozenBN") and has_norm and not statistics:
            return "it was trained with BatchNorm, and this model has Group Normalization"
        return None

    def mend(self, weights: str) -> str:
        """The command that makes a file which this model takes, if there is one."""
        conflict = self.norm_conflict()
        if conflict is None:
            return f"; run `{conversion_command(weights)}` for its trunk"
        to_gn = self.norm != "GN"
        return f"; run `{conversion_command(weights, 'GN')}`" if to_gn else "; change the norm"

    def mistake(self, whole: bool) -> str | None:
        """Why this must not be trained on, or None.

        A part is filled whole or not at all, and a trunk always; but predictors follow from the
        classes, and are made anew for others. What belongs to no part of the model is no mistake.

        Args:
            whole: whether all of the model has to come from the file.
        """
        filled = count_parts(n for n in self.model if n not in self.fresh)
        if not filled:
            return "none of its tensors belongs to this model"
        if why := self.norm_conflict():
            return why
        for name in sorted(self.fresh):
            part = part_of(name)
            if not whole and name not in self.misshapen and re.search(DEFORMABLE, name):
                continue
            if whole or part in TRUNK or (part in filled and not re.search(PREDICTORS, name)):
                how = "has another shape there" if name in self.misshapen else "is not in it"
                return f"it fills this model in part only: {name} {how}"
        parts = count_parts(self.model)
        stages = {_stage(name) for name in self.model}
        for name in sorted(self.unused):
            part = part_of(name)
            known = re.search(f"{CLASSIFIER}|{STEM_BIAS}|{SETTINGS}|{PREDICTORS}", name)
            # A trunk's file has no prefix: its parts are stages, and a model may stop before res5
            belongs = _stage(name) in stages if part not in parts else True
            if belongs and not known:
                return f"it is of another model, with a tensor {name}"
        return None


def conversion_command(weights: str, norm: str | None = None) -> str:
    """The command that makes Detectron2's file of another one."""
    path = weights.partition("?")[0]
    stem = re.sub(
        r"(\.\w{2,11})?$", "", path.rpartition("/")[2] if "://" in path else path, count=1
    )
    calibrate = f" --norm {norm} --calibrate PICTURES" if norm else ""
    ending = f"_{norm.lower()}" if norm else "_detectron2"
    words = shlex.join((path, f"{stem}{ending}.pth"))
    return f"python tools/convert_backbone.py {words}{calibrate}"


def _stage(name: str) -> str:
    found = re.match(r"(?:backbone\.)?(?:bottom_up\.)?(stem|res\d)\.", name)
    return found[1] if found else name
