"""The trainings of a comparison: norms x batch sizes x seeds, alike in all but the norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

from detectron2.config import CfgNode

from ..checkpoint.facts import GROUP_NORM, NORM, PIXELS, STRIDE
from ..errors import InputError
from ..modeling.norm import is_group_norm

NORMS = ("FrozenBN", "BN", "SyncBN", "GN", "LN", "IN")
NORM_KEYS = (
    *(NORM, "MODEL.FPN.NORM"),
    *("MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM"),
)


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        norm: of the backbone, as "GN", or of the backbone and of FPN and heads, as "FrozenBN/GN".
        images: a step.
    """

    norm: str
    images: int
    seed: int

    def __str__(self) -> str:
        return f"{self.norm}, {self.images} a batch, seed {self.seed}"

    @property
    def folder(self) -> str:
        return f"{self.norm.replace('/', '-')}_{self.images}_seed{self.seed}"


def plan(norms: Sequence[str], batches: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """All cells, one seed after the other, so that a comparison that is cut short has whole seeds.

    Raises:
        InputError: for unknown norms, and for what is given twice.
    """
    for flag, values in (("norms", norms), ("images-per-batch", batches), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise InputError(f"--{flag} {' '.join(map(str, values))}: give each once")
    for norm in norms:
        if not all(part in NORMS for part in norm.split("/")) or norm.count("/") > 1:
            raise InputError(f"--norms {norm}: give {', '.join(NORMS)}, or two as BACKBONE/HEADS")
    if any(batch < 1 for batch in batches):
        raise InputError("--images-per-batch: a batch has one image or more")
    if any(seed < 0 for seed in seeds):
        raise InputError("--seeds: below 0 Detectron2 would draw another one every time")
    order = product(seeds, batches, norms)
    return [Cell(norm, images, seed) for seed, images, norm in order]


def split_norm(norm: str) -> tuple[str, str]:
    """The norm of the backbone, and of FPN and heads: none beside BN, as everyone trains it."""
    backbone, slash, heads = norm.partition("/")
    return backbone, heads if slash else backbone * is_group_norm(backbone)


def where(cfg: CfgNode) -> str:
    """Which parts of a model have which norm, in words."""
    parts = {
        "backbone": cfg.MODEL.RESNETS.NORM,
        "FPN": cfg.MODEL.FPN.NORM if has_fpn(cfg) else "",
        "box head": cfg.MODEL.ROI_BOX_HEAD.NORM if has_box_convs(cfg) else "",
        "mask head": cfg.MODEL.ROI_MASK_HEAD.NORM if has_mask_convs(cfg) else "",
    }
    norms = dict.fromkeys(norm for norm in parts.values() if norm)
    return "; ".join(
        f"{norm}: {', '.join(part for part, own in parts.items() if own == norm)}" for norm in norms
    )


def has_fpn(cfg: CfgNode) -> bool:
    """Whether a model has an FPN, whose norm can be told."""
    return "fpn" in cfg.MODEL.BACKBONE.NAME


def has_box_convs(cfg: CfgNode) -> bool:
    """Whether its box head has convolutions, whose norm can be told."""
    heads = cfg.MODEL.ROI_HEADS.NAME in ("StandardROIHeads", "CascadeROIHeads")
    return heads and cfg.MODEL.ROI_BOX_HEAD.NUM_CONV > 0


def has_mask_convs(cfg: CfgNode) -> bool:
    """Whether it has a mask head of its own, whose norm can be told."""
    heads = cfg.MODEL.ROI_HEADS.NAME in ("StandardROIHeads", "CascadeROIHeads")
    return heads and cfg.MODEL.MASK_ON


def norm_keys(norm: str, cfg: CfgNode) -> dict[str, str]:
    """The `NORM` keys that a model of this config has layers for."""
    backbone, heads = split_norm(norm)
    keys = {NORM: backbone}
    for key, has in zip(NORM_KEYS[1:], (has_fpn, has_box_convs, has_mask_convs), strict=True):
        keys[key] = heads if has(cfg) else ""
    return keys


def check_pairs(configs: Mapping[Cell, CfgNode]) -> None:
    """Refuse cells of one batch size and seed that differ in more than norm and initial weights.

    Weights bring the pixels that they were trained on, where their strides are, and GN's groups.

    Raises:
        InputError: naming the keys.
    """
    allowed = {*NORM_KEYS, *PIXELS, *GROUP_NORM, STRIDE, "MODEL.WEIGHTS", "OUTPUT_DIR"}

    def pair(cell: Cell) -> tuple[int, int]:
        return cell.images, cell.seed

    for _, group in groupby(sorted(configs, key=pair), pair):
        first, *others = group
        for other in others:
            one, two = flatten(configs[first]), flatten(configs[other])
            keys = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
            if wrong := [key for key in keys if key not in allowed]:
                told = ", ".join(f"{key} {one.get(key)} and {two.get(key)}" for key in wrong)
                raise InputError(f"{first} and {other} differ in more than the norm: {told}")


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """A config's values by their whole keys."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
