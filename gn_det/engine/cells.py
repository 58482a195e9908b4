"""The trainings of a comparison: norms x batch sizes x seeds, alike in all but the norm."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..checkpoint.convert import convert
from ..checkpoint.facts import GROUP_NORM, NORM, PIXELS, STRIDE, describe
from ..checkpoint.read import read_weights
from ..checkpoint.save import save_backbone
from ..config import value_of
from ..errors import InputError
from ..modeling.norm import is_group_norm
from .convert_backbone import NUM_PICTURES, to_group_norm

NORMS = ("FrozenBN", "BN", "SyncBN", "GN", "LN", "IN")
NORM_KEYS = (
    *(NORM, "MODEL.FPN.NORM"),
    *("MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM"),
)
# Of the training towards the BN network's features that follows on calibration
DISTILL_STEPS = 300


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


def weight_keys(weights: str) -> dict[str, Any]:
    """`MODEL.WEIGHTS` and the keys that have to agree with them, other than the norm."""
    facts = {key: value for key, value in describe(weights).items() if key != NORM}
    return {"MODEL.WEIGHTS": weights, **facts}


def untold_keys(weights: str, cfg: CfgNode) -> dict[str, Any]:
    """Pixels and strides of a backbone's file that does not tell its own: the config's.

    They are BN*'s by Detectron2's own rule, and so GN has to be measured with them, too.
    """
    facts = describe(weights) if weights else {}
    if not facts or not Path(weights).is_file():
        return {}
    return {key: value_of(cfg, key) for key in (*PIXELS, STRIDE) if key not in facts}


def find_weights(
    norms: Iterable[str],
    given: Sequence[str],
    cfg: CfgNode,
    pictures: Sequence[Path],
    output: Path,
    distill_steps: int = DISTILL_STEPS,
) -> dict[str, str]:
    """Initial weights for each norm; a BN backbone is converted where it has to be.

    Args:
        given: `--init`, each a file, or NORM=FILE. The base config's weights, if there are none.
        cfg: the base config.
        pictures: of the training set; gamma and beta are measured on a choice of these.
        output: folder for what is made.
        distill_steps: of the training towards the BN network's features that follows.

    Raises:
        InputError: for a norm without weights.
    """
    named = dict(word.split("=", 1) for word in given if _names_norm(word))
    files = [word for word in given if not _names_norm(word)]
    if len(files) > 1:
        raise InputError(f"--init {' '.join(files)}: say what for, as GN={files[1]}")
    for norm in named:
        if norm not in norms:
            raise InputError(f"--init {norm}={named[norm]}: --norms has no {norm}")
    default = files[0] if files else cfg.MODEL.WEIGHTS
    if Path(default).is_file():
        default = str(Path(default).resolve())
    found = {n: named[n] if n in named else published(n, default, cfg) for n in norms}
    for norm, weights in found.items():
        if weights is None:
            file = make_group_norm(Path(default), cfg, pictures, output, distill_steps)
            found[norm] = str(file)
    return {norm: str(weights) for norm, weights in found.items()}


def _names_norm(word: str) -> bool:
    return word.partition("=")[0].partition("/")[0] in NORMS and "=" in word


def published(norm: str, weights: str, cfg: CfgNode) -> str | None:
    """The weights that there are for a norm: the given ones, or GN's own of a published backbone.

    Args:
        norm: as in `Cell`.
        weights: "" for training from scratch.

    Returns:
        None for a file that has to be converted.

    Raises:
        InputError: if there are none, and none can be made.
    """
    backbone = split_norm(norm)[0]
    own = describe(weights).get(NORM) if weights else None
    if own is None or is_group_norm(own) == is_group_norm(backbone):
        return weights
    if backbone == "GN" and Path(weights).is_file():
        return None
    if backbone == "GN" and (depth := cfg.MODEL.RESNETS.DEPTH) in (50, 101):
        return f"catalog://ImageNetPretrained/FAIR/R-{depth}-GN"
    raise InputError(f"{weights} has {own}: give weights for {norm}, as --init {norm}=FILE")


def make_group_norm(
    weights: Path, cfg: CfgNode, pictures: Sequence[Path], output: Path, distill_steps: int
) -> Path:
    """A GN backbone from a BN one, measured and distilled on pictures without labels.

    Args:
        cfg: has the division into groups, and what the file does not tell.

    Returns:
        the file, which is made if it is not there; its name tells all that it depends on.
    """
    division = {key: value_of(cfg, key) for key in GROUP_NORM}
    untold = untold_keys(str(weights), cfg)
    chosen = random.Random(0).sample(sorted(pictures), min(NUM_PICTURES, len(pictures)))
    mark = sha256(weights.read_bytes())
    mark.update(json.dumps([division, untold, distill_steps, *map(str, chosen)]).encode())
    path = (output / f"{weights.stem}_gn_{mark.hexdigest()[:12]}.pth").resolve()
    if path.is_file():
        return path
    output.mkdir(parents=True, exist_ok=True)
    pairs = [str(word) for pair in untold.items() for word in pair]
    conversion = convert(read_weights(weights), opts=pairs)
    conversion.refuse_gaps([], [])
    if torch.cuda.is_available():
        conversion.cfg.MODEL.DEVICE = "cuda"
    torch.manual_seed(0)
    opts = [str(word) for pair in division.items() for word in pair]
    to_group_norm(conversion, opts, chosen, distill_steps)
    save_backbone(conversion.tensors, conversion.cfg, path)
    return path


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
