"""The initial weights of each norm in a comparison; a BN backbone is converted for GN."""

import json
import random
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..checkpoint.bn_to_gn import NUM_IMAGES, to_group_norm
from ..checkpoint.convert import convert
from ..checkpoint.facts import GROUP_NORM, NORM, PIXELS, STRIDE, describe
from ..checkpoint.read import read_weights
from ..checkpoint.save import save_backbone
from ..config import as_opts, value_of
from ..errors import InputError
from ..modeling.norm import is_group_norm
from .plan import NORMS, split_norm

# Of the training towards the BN network's features that follows on calibration
DISTILL_STEPS = 300


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
    chosen = random.Random(0).sample(sorted(pictures), min(NUM_IMAGES, len(pictures)))
    mark = sha256(weights.read_bytes())
    mark.update(json.dumps([division, untold, distill_steps, *map(str, chosen)]).encode())
    path = (output / f"{weights.stem}_gn_{mark.hexdigest()[:12]}.pth").resolve()
    if path.is_file():
        return path
    output.mkdir(parents=True, exist_ok=True)
    pairs = as_opts(untold)
    conversion = convert(read_weights(weights), opts=pairs)
    conversion.refuse_gaps([], [])
    if torch.cuda.is_available():
        conversion.cfg.MODEL.DEVICE = "cuda"
    torch.manual_seed(0)
    opts = as_opts(division)
    to_group_norm(conversion, opts, chosen, distill_steps)
    save_backbone(conversion.tensors, conversion.cfg, path)
    return path
