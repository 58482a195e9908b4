"""Keys that must agree with the initial weights."""

from collections.abc import Iterator

from detectron2.config import CfgNode

from ..checkpoint.facts import GROUP_NORM, NORM, Facts, describe, needs_conversion
from ..checkpoint.load import conversion_command
from ..config import value_of
from ..errors import InputError
from ..modeling.norm import is_group_norm
from .problem import Problem

# Detectron's pixel means and Detectron2's differ by less than 1 of 255
PIXEL_TOLERANCE = 1.0


def check_weights(cfg: CfgNode) -> Iterator[Problem]:
    """Keys that contradict what is known of the file that `MODEL.WEIGHTS` names."""
    if "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return
    weights = cfg.MODEL.WEIGHTS
    try:
        facts = describe(weights)
        source = needs_conversion(weights)
    except InputError as error:
        yield Problem("MODEL.WEIGHTS", weights, str(error), "give another file")
        return
    if source:
        why = f"it is {source}'s, which Detectron2 would not load"
        yield Problem("MODEL.WEIGHTS", weights, why, f"run `{conversion_command(weights)}`")
        return
    if problem := _norm_conflict(cfg, facts):
        yield problem
    for key, right in facts.items():
        value = value_of(cfg, key)
        if key in (NORM, *GROUP_NORM) or _same(value, right):
            continue
        why = f"{weights} was trained with {right}"
        yield Problem(key, value, why, f"set {key} to that")


def group_mismatch(cfg: CfgNode) -> str | None:
    """A warning, where GN weights meet another division into groups than their own.

    No mistake, since Table 3 compares divisions; but the paper pretrains each with its own.
    """
    facts = describe(cfg.MODEL.WEIGHTS)
    if cfg.MODEL.RESNETS.NORM != "GN" or GROUP_NORM[0] not in facts:
        return None
    groups, width = (facts[key] for key in GROUP_NORM)
    keys = cfg.MODEL.GROUP_NORM
    if (keys.DIM_PER_GP, keys.NUM_GROUPS * (width < 1)) == (width, groups * (width < 1)):
        return None
    own = f"{groups} groups" if width < 1 else f"{width} channels per group"
    return (
        f"{cfg.MODEL.WEIGHTS} was trained with {own}, and MODEL.GROUP_NORM asks for another "
        "division: its features will be off at first"
    )


def _norm_conflict(cfg: CfgNode, facts: Facts) -> Problem | None:
    """Why the trunk's norm cannot take these weights."""
    norm, own, weights = cfg.MODEL.RESNETS.NORM, facts.get(NORM, ""), cfg.MODEL.WEIGHTS
    mend = "give weights that were trained with this norm, or change the norm"
    why = None
    if own in ("BN", "FrozenBN") and (is_group_norm(norm) or norm == ""):
        why = (
            f'it was trained with BatchNorm, but MODEL.RESNETS.NORM is "{norm}": its gamma and '
            "beta would be loaded without a word, though fitted to other statistics"
        )
        if norm == "GN":
            mend = f"run `{conversion_command(weights, 'GN')}`, or change the norm"
    elif own == "FrozenBN" and norm != "FrozenBN":
        why = (
            "its BatchNorm is fused into an affine map, so that only FrozenBN can take it "
            f'(its detectron2:// namesake is not), but MODEL.RESNETS.NORM is "{norm}"'
        )
    elif is_group_norm(own) and not _takes(norm, facts):
        why = f'it was trained with Group Normalization, but MODEL.RESNETS.NORM is "{norm}"'
    return Problem("MODEL.WEIGHTS", weights, why, mend) if why else None


def _takes(norm: str, facts: Facts) -> bool:
    """Whether a norm takes weights of `GroupNorm`s."""
    if facts[NORM] == "GN" and GROUP_NORM[0] not in facts:
        # The names of a file's tensors tell BN from GN, but not GN from LN or IN
        return is_group_norm(norm)
    return norm == facts[NORM]


def _same(value: object, right: object) -> bool:
    if isinstance(value, list | tuple) and isinstance(right, list | tuple):
        return len(value) == len(right) and all(
            abs(a - b) <= PIXEL_TOLERANCE for a, b in zip(value, right, strict=True)
        )
    return value == right
