"""Strict loading: a mismatch between the tensors of a model and a file aborts training."""

import re
import shlex
from dataclasses import dataclass

from ..modeling.parts import BACKBONE_PARTS, PREDICTORS, SETTINGS, count_parts, part_of
from .names import CLASSIFIER, STEM_BIAS

# Offsets of deformable convolutions start at 0, and files of plain networks lack them
DEFORMABLE = r"\.conv2_offset\."


@dataclass
class Loaded:
    """The result of loading a file of weights, as names of tensors."""

    # All weights of the model
    model: list[str]
    # Weights of the model that were not loaded, and of these the ones with another shape
    fresh: set[str]
    misshapen: set[str]
    # Tensors of the file that the model does not have
    unused: set[str]
    # "BN", "FrozenBN" or "GN" according to the names in the file; None if unknown
    norm: str | None

    def summary(self) -> str:
        """Lines that count the loaded, initialised and unused tensors of each part."""
        lines = [("loaded", [n for n in self.model if n not in self.fresh])]
        lines += [("initialised", sorted(self.fresh)), ("not used", sorted(self.unused))]
        return "\n".join(
            f"  {title:11} {len(names):4} tensors: "
            + (", ".join(f"{part} {n}" for part, n in count_parts(names).items()) or "none")
            for title, names in lines
        )

    def norm_conflict(self) -> str | None:
        """Why the file's norm contradicts the backbone's, although Detectron2 might load it."""
        backbone = [name for name in self.model if part_of(name) in BACKBONE_PARTS]
        statistics = any(name.endswith("norm.running_mean") for name in backbone)
        if self.norm == "GN" and statistics:
            return "it was trained with Group Normalization, but this model has BatchNorm"
        has_norm = any(name.endswith("norm.weight") for name in backbone)
        if self.norm in ("BN", "FrozenBN") and has_norm and not statistics:
            return "it was trained with BatchNorm, but this model has Group Normalization"
        return None

    def fix(self, weights: str) -> str:
        """The fix for a mismatch, as the end of an error message.

        Args:
            weights: the value of `MODEL.WEIGHTS`.
        """
        if self.norm_conflict() is None:
            return f"; to use its backbone, run `{conversion_command(weights)}`"
        if self.norm == "GN":
            section = "VGG" if any(part_of(name) == "VGG" for name in self.model) else "RESNETS"
            return f"; change MODEL.{section}.NORM"
        return f"; run `{conversion_command(weights, 'GN')}`"

    def mismatch(self, complete: bool) -> str | None:
        """Why training with these weights would be wrong, or None if they match.

        The backbone must be loaded completely. Any other part must be loaded completely or not at
        all. Predictors are an exception, since their shapes depend on the classes. Tensors of
        parts that the model does not have are ignored.

        Args:
            complete: whether every tensor of the model must come from the file.
        """
        filled = count_parts(n for n in self.model if n not in self.fresh)
        if not filled:
            return "none of its tensors match this model"
        if reason := self.norm_conflict():
            return reason
        for name in sorted(self.fresh):
            part = part_of(name)
            if not complete and name not in self.misshapen and re.search(DEFORMABLE, name):
                continue
            needed = part in BACKBONE_PARTS or (part in filled and not re.search(PREDICTORS, name))
            if complete or needed:
                state = "has another shape in" if name in self.misshapen else "is missing from"
                return f"it does not fill the model: {name} {state} the file"
        parts = count_parts(self.model)
        stages = {_stage(name) for name in self.model}
        for name in sorted(self.unused):
            part = part_of(name)
            known = re.search(f"{CLASSIFIER}|{STEM_BIAS}|{SETTINGS}|{PREDICTORS}", name)
            # The parts of a backbone's file are stages, and the model may end before res5
            belongs = _stage(name) in stages if part not in parts else True
            if belongs and not known:
                return f"it is from another model: this model has no tensor {name}"
        return None


def conversion_command(weights: str, norm: str | None = None) -> str:
    """The command line that converts a file of weights for Detectron2.

    Args:
        weights: path or address of the file, as in `MODEL.WEIGHTS`.
        norm: norm to convert to, or None to keep the file's norm.
    """
    path = weights.partition("?")[0]
    stem = re.sub(
        r"(\.\w{2,11})?$", "", path.rpartition("/")[2] if "://" in path else path, count=1
    )
    calibrate = f" --norm {norm} --calibrate IMAGES" if norm else ""
    ending = f"_{norm.lower()}" if norm else "_detectron2"
    words = shlex.join((path, f"{stem}{ending}.pth"))
    return f"python tools/convert_backbone.py {words}{calibrate}"


def _stage(name: str) -> str:
    """The stage of a backbone's tensor, such as "res2"; the name itself for other tensors."""
    found = re.match(r"(?:backbone\.)?(?:bottom_up\.)?(stem|res\d|conv\d(?=_\d))[._]", name)
    return found[1] if found else name
