"""Strict loading: every tensor of the model and of the file is accounted for, or training stops."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import InputError
from ..modeling.parts import PREDICTORS, SETTINGS, TRUNK, count_parts, part_of, weight_names
from .names import CLASSIFIER, STEM_BIAS, norm_of

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


class StrictCheckpointer(DetectionCheckpointer):
    """Detectron2's, which says in one block what it loaded, and refuses what does not fit.

    Args:
        whole: whether the file has to fill all of the model, as for evaluation. Always so when
            training goes on from a checkpoint of its own.

    Raises:
        InputError: on loading a file that the model does not fit.
    """

    loaded: Loaded | None = None

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, whole: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        self._whole = whole
        self._path = ""

    def load(self, path: str, checkpointables: list[str] | None = None, **kwargs: Any) -> Any:
        self._path, whole = path, self._whole
        self._whole = whole or checkpointables is None
        try:
            return super().load(path, checkpointables, **kwargs)
        finally:
            self._whole = whole

    def _load_model(self, checkpoint: Any) -> None:
        norm = norm_of(checkpoint["model"])
        found = super()._load_model(checkpoint)
        model = weight_names(self.model)
        misshapen = {name for name, *_ in found.incorrect_shapes}
        # Where names are matched by their endings, Detectron2 drops what has another shape
        fresh = {*found.missing_keys, *misshapen} & {*model}
        lost = {n for n in found.unexpected_keys if any(f.endswith(f".{n}") for f in fresh)}
        misshapen |= {f for f in fresh if any(f.endswith(f".{n}") for n in lost)}
        unused = {*found.unexpected_keys} - lost
        self.loaded = Loaded(model, fresh, misshapen, unused, norm)
        logging.getLogger(__name__).info(f"Weights of {self._path}\n{self.loaded.block()}")
        if why := self.loaded.mistake(self._whole):
            mend = "" if self._whole else self.loaded.mend(self._path)
            raise InputError(f"MODEL.WEIGHTS {self._path}: {why}{mend}")


def conversion_command(weights: str, norm: str | None = None) -> str:
    """The command that makes Detectron2's file of another one."""
    path = weights.partition("?")[0]
    stem = re.sub(
        r"(\.\w{2,11})?$", "", path.rpartition("/")[2] if "://" in path else path, count=1
    )
    calibrate = f" --norm {norm} --calibrate PICTURES" if norm else ""
    ending = f"_{norm.lower()}" if norm else "_detectron2"
    return f"python tools/convert_backbone.py {path} {stem}{ending}.pth{calibrate}"


def _stage(name: str) -> str:
    found = re.match(r"(?:backbone\.)?(?:bottom_up\.)?(stem|res\d)\.", name)
    return found[1] if found else name
