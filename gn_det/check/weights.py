"""Keys that must agree with the initial weights."""

from collections.abc import Iterator

from detectron2.config import CfgNode

from ..checkpoint import Weights, describe
from ..errors import InputError
from ..modeling.norm import is_group_norm
from .problem import Problem

# Detectron's pixel means and Detectron2's differ by less than 1 of 255
PIXEL_TOLERANCE = 1.0


def check_weights(cfg: CfgNode) -> Iterator[Problem]:
    """Keys that contradict what is known of the file that `MODEL.WEIGHTS` names."""
    if "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return
    try:
        weights = describe(cfg.MODEL.WEIGHTS)
    except InputError as error:
        yield Problem("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, str(error), "give another file")
        return
    if why := _norm_conflict(cfg, weights):
        mend = "give weights that were trained with this norm, or change the norm"
        yield Problem("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, why, mend)
    if cfg.MODEL.RESNETS.WEIGHT_STANDARDIZATION and weights.depth:
        why = f"{cfg.MODEL.WEIGHTS} was trained without it"
        yield Problem("MODEL.RESNETS.WEIGHT_STANDARDIZATION", True, why, "set it to False")
    for key, value, right in (
        ("MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH, weights.depth),
        ("MODEL.RESNETS.STRIDE_IN_1X1", cfg.MODEL.RESNETS.STRIDE_IN_1X1, weights.stride_in_1x1),
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, weights.image_format),
        ("MODEL.PIXEL_MEAN", cfg.MODEL.PIXEL_MEAN, weights.pixel_mean),
        ("MODEL.PIXEL_STD", cfg.MODEL.PIXEL_STD, weights.pixel_std),
    ):
        if right is not None and not _same(value, right):
            shown = list(right) if isinstance(right, tuple) else right
            why = f"{cfg.MODEL.WEIGHTS} was trained with {shown}"
            yield Problem(key, value, why, f"set {key} to that")


def group_mismatch(cfg: CfgNode) -> str | None:
    """A warning, where published GN weights meet another division into groups than their own.

    No mistake, since Table 3 compares divisions; but the paper pretrains each with its own.
    """
    groups = describe(cfg.MODEL.WEIGHTS).num_groups
    keys = cfg.MODEL.GROUP_NORM
    if groups is None or (keys.DIM_PER_GP < 1 and groups == keys.NUM_GROUPS):
        return None
    return (
        f"{cfg.MODEL.WEIGHTS} was trained with {groups} groups, and MODEL.GROUP_NORM asks for "
        "another division: its features will be off at first"
    )


def _norm_conflict(cfg: CfgNode, weights: Weights) -> str | None:
    """Why the trunk's norm cannot take these weights."""
    norm = cfg.MODEL.RESNETS.NORM
    of_group = is_group_norm(norm)
    # The names of a file's tensors tell BN from GN, but not GN from LN or IN
    fits_gn = norm == "GN" if weights.num_groups else of_group
    if weights.norm == "BN" and (of_group or norm == ""):
        return (
            f'it was trained with BatchNorm, but MODEL.RESNETS.NORM is "{norm}": its gamma and '
            "beta would be loaded without a word, though fitted to other statistics"
        )
    if weights.norm == "GN" and not fits_gn:
        return f'it was trained with Group Normalization, but MODEL.RESNETS.NORM is "{norm}"'
    if weights.fused and norm != "FrozenBN":
        return (
            "its BatchNorm is fused into an affine map, so that only FrozenBN can take it "
            f'(its detectron2:// namesake is not), but MODEL.RESNETS.NORM is "{norm}"'
        )
    return None


def _same(value: object, right: object) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(right, tuple) and len(value) == len(right):
        return all(abs(a - b) <= PIXEL_TOLERANCE for a, b in zip(value, right, strict=True))
    return value == right
