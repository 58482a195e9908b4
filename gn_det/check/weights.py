"""Checks of the keys that must match the initial weights."""

import re
from collections.abc import Iterator

from detectron2.config import CfgNode

from ..checkpoint.facts import (
    GROUP_NORM,
    KEYS_OF,
    NORM_FACTS,
    VGG_NORM,
    Facts,
    describe,
    needs_conversion,
    norm_in,
)
from ..checkpoint.load import conversion_command
from ..config import value_of
from ..errors import InputError
from ..modeling.norm import backbone_norm, backbone_section, is_group_norm
from .problem import Problem

# Pixel means of Detectron and Detectron2 differ by less than 1, on the scale of 0 to 255
PIXEL_TOLERANCE = 1.0


def check_weights(cfg: CfgNode) -> Iterator[Problem]:
    """Check for keys that contradict what is known about the file in `MODEL.WEIGHTS`."""
    if not re.search("resnet|vgg", cfg.MODEL.BACKBONE.NAME):
        return
    weights = cfg.MODEL.WEIGHTS
    try:
        facts = describe(weights)
        source = needs_conversion(weights)
    except InputError as error:
        yield Problem("MODEL.WEIGHTS", weights, str(error), "name another file")
        return
    if source:
        reason = f"it is a checkpoint of {source}, which Detectron2 cannot load"
        yield Problem("MODEL.WEIGHTS", weights, reason, f"run `{conversion_command(weights)}`")
        return
    section = backbone_section(cfg)
    if other := {key.split(".")[1] for key in facts} & {*KEYS_OF} - {section}:
        kind = "VGG" if "VGG" in other else "ResNet"
        name, fix = cfg.MODEL.BACKBONE.NAME, "name another file, or change the backbone"
        reason = f"it holds a {kind}, but MODEL.BACKBONE.NAME is {name}"
        yield Problem("MODEL.WEIGHTS", weights, reason, fix)
        return
    if problem := _norm_conflict(cfg, facts):
        yield problem
    for key, right in facts.items():
        value = value_of(cfg, key)
        if key in (*NORM_FACTS, *GROUP_NORM) or _same(value, right):
            continue
        reason = f"{weights} was trained with {right}"
        yield Problem(key, value, reason, f"set {key} {right}")


def grouping_mismatch(cfg: CfgNode) -> str | None:
    """A warning if GN weights were trained with another grouping than the config's, else None.

    Not an error, since Table 3 compares groupings; but the paper pretrains each model with the
    grouping that it is fine-tuned with.
    """
    facts = describe(cfg.MODEL.WEIGHTS)
    if backbone_norm(cfg) != "GN" or GROUP_NORM[0] not in facts:
        return None
    groups, width = (facts[key] for key in GROUP_NORM)
    keys = cfg.MODEL.GROUP_NORM
    if (keys.DIM_PER_GP, keys.NUM_GROUPS * (width < 1)) == (width, groups * (width < 1)):
        return None
    own = f"{groups} groups" if width < 1 else f"{width} channels per group"
    return (
        f"{cfg.MODEL.WEIGHTS} was trained with {own}, but MODEL.GROUP_NORM sets another grouping: "
        "its features will be wrong until fine-tuning has adapted them"
    )


def _norm_conflict(cfg: CfgNode, facts: Facts) -> Problem | None:
    """The problem if the backbone's norm cannot use these weights, else None."""
    norm, own, weights = backbone_norm(cfg), norm_in(facts) or "", cfg.MODEL.WEIGHTS
    key = f"MODEL.{backbone_section(cfg)}.NORM"
    fix = "use weights that were trained with this norm, or change the norm"
    reason = None
    if own in ("BN", "FrozenBN") and (is_group_norm(norm) or norm == ""):
        reason = (
            f'it was trained with BatchNorm, but {key} is "{norm}": its gamma and '
            "beta would be loaded without a warning, but they belong to other statistics"
        )
        if norm == "GN":
            fix = f"run `{conversion_command(weights, 'GN')}`, or change the norm"
    elif own == "FrozenBN" and norm != "FrozenBN":
        reason = (
            "its BatchNorm is fused into an affine layer, which only FrozenBN can load (the file "
            f'of the same name under detectron2:// is not fused), but {key} is "{norm}"'
        )
    elif is_group_norm(own) and not _accepts(norm, facts):
        reason = f'it was trained with Group Normalization, but {key} is "{norm}"'
    elif VGG_NORM in facts and own == "" and norm != "":
        reason = f'it was trained without a norm, but {key} is "{norm}"'
    return Problem("MODEL.WEIGHTS", weights, reason, fix) if reason else None


def _accepts(norm: str, facts: Facts) -> bool:
    """Whether a norm can load weights that were trained with GN, LN or IN."""
    if norm_in(facts) == "GN" and GROUP_NORM[0] not in facts:
        # The grouping is unknown, and GN, LN and IN have the same tensor names
        return is_group_norm(norm)
    return norm == norm_in(facts)


def _same(value: object, right: object) -> bool:
    if isinstance(value, list | tuple) and isinstance(right, list | tuple):
        return len(value) == len(right) and all(
            abs(a - b) <= PIXEL_TOLERANCE for a, b in zip(value, right, strict=True)
        )
    return value == right
