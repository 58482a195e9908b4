"""Choose the initial weights of each norm; convert a BN backbone to GN where needed."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..check.norm_keys import STOCK
from ..checkpoint.bn_to_gn import NUM_IMAGES, to_group_norm
from ..checkpoint.convert import convert
from ..checkpoint.facts import GROUP_NORM, NORM_FACTS, PIXELS, STRIDE, VGG_NORM, describe, norm_in
from ..checkpoint.read import read_weights
from ..checkpoint.recipe import GROUPING, HEADS_GROUPING, recorded_recipe
from ..checkpoint.save import save_backbone
from ..config import as_opts, default_config, value_of
from ..errors import InputError
from ..files import write_whole
from ..modeling.norm import backbone_section, is_group_norm
from ..modeling.parts import BACKBONE_PARTS, PARTS, part_of
from .cells import NORMS, split_norm

# Steps of distillation from the BN network's features, after calibration
DISTILL_STEPS = 300
# Suffix of the file beside a converted backbone that holds the feature errors as text
ERRORS = ".errors.txt"


def weight_keys(weights: str) -> dict[str, Any]:
    """`MODEL.WEIGHTS`, and the keys other than the norm that must agree with the checkpoint."""
    facts = {key: value for key, value in describe(weights).items() if key not in NORM_FACTS}
    return {"MODEL.WEIGHTS": weights, **facts}


def own_recipe(weights: str, cfg: CfgNode, opts: Sequence[str]) -> dict[str, Any]:
    """The keys of the recipe that a weights file records, except those that the user has set.

    The grouping of FPN and heads is left out, since all norms of a comparison get the same.

    Args:
        weights: value of `MODEL.WEIGHTS`.
        cfg: the base config.
        opts: the user's `KEY VALUE` pairs.
    """
    kept = {k: v for k, v in recorded_recipe(weights).items() if k not in HEADS_GROUPING}
    return {key: value for key, value in kept.items() if not _is_set(key, cfg, opts)}


def _is_set(key: str, cfg: CfgNode, opts: Sequence[str]) -> bool:
    """Whether the base config or the user's `KEY VALUE` pairs set a key of gn_det."""
    return key in {*opts[::2]} or value_of(cfg, key) != value_of(default_config(), key)


def missing_facts(weights: str, cfg: CfgNode) -> dict[str, Any]:
    """Pixel and stride keys that a backbone file does not record, with the config's values.

    Detectron2 uses the config's values for such a file. The conversion to GN must use the same.
    """
    facts = describe(weights) if weights else {}
    if not facts or not Path(weights).is_file():
        return {}
    keys = PIXELS if VGG_NORM in facts else (*PIXELS, STRIDE)
    return {key: value_of(cfg, key) for key in keys if key not in facts}


def find_weights(
    norms: Iterable[str],
    given: Sequence[str],
    cfg: CfgNode,
    images: Sequence[Path],
    output: Path,
    distill_steps: int = DISTILL_STEPS,
    opts: Sequence[str] = (),
) -> dict[str, str]:
    """Initial weights of each norm; a BN backbone is converted for GN where needed.

    Args:
        norms: as in `Cell`.
        given: values of `--init`, each a file or NORM=FILE, where the file of FrozenBN also stands
            for FrozenBN/GN; without any, the base config's weights.
        cfg: the base config.
        images: of the training set; a conversion measures gamma and beta on a sample of them.
        output: folder for converted backbones.
        distill_steps: steps of distillation after calibration.
        opts: the user's `KEY VALUE` pairs, which `cfg` contains already.

    Returns:
        {norm: value of `MODEL.WEIGHTS`}.

    Raises:
        InputError: if a norm has no weights, or `given` is ambiguous.
    """
    named = dict(word.split("=", 1) for word in given if _names_norm(word))
    files = [word for word in given if not _names_norm(word)]
    if len(files) > 1:
        raise InputError(f"--init {' '.join(files)}: name the norm of each, as GN={files[1]}")
    for norm in named:
        if norm not in norms:
            raise InputError(f"--init {norm}={named[norm]}: add {norm} to --norms, or remove it")
    if not files:
        # FrozenBN=FILE is the backbone of FrozenBN/GN, too
        same = {norm: split_norm(norm)[0] for norm in norms}
        named = {norm: named[one] for norm, one in same.items() if one in named} | named
    default = files[0] if files else cfg.MODEL.WEIGHTS
    if Path(default).is_file():
        default = str(Path(default).resolve())
    own = [norm for norm in norms if norm not in named]
    if len({split_norm(norm) for norm in own}) > 1 and holds_detector(default):
        # Heads with another norm, or a converted backbone, could not take the rest
        default = str(extract_backbone(Path(default), cfg, output))
    weights = {n: named[n] if n in named else choose_weights(n, default, cfg) for n in norms}
    # Detectron2's own builder always has 32 groups
    stock = cfg.MODEL.BACKBONE.NAME in STOCK
    own_grouping = stock or any(_is_set(key, cfg, opts) for key in GROUP_NORM)
    grouping = {key: value_of(cfg, key) for key in GROUP_NORM} if own_grouping else GROUPING
    for norm, path in weights.items():
        if path is None:
            file = convert_to_gn(Path(default), cfg, grouping, images, output, distill_steps)
            weights[norm] = str(file)
    return {norm: str(path) for norm, path in weights.items()}


def _names_norm(word: str) -> bool:
    return word.partition("=")[0].partition("/")[0] in NORMS and "=" in word


def choose_weights(norm: str, weights: str, cfg: CfgNode) -> str | None:
    """The given weights if they fit a norm, or else the published GN backbone.

    Args:
        norm: as in `Cell`.
        weights: file or address; "" for training from scratch.
        cfg: the base config.

    Returns:
        A value of `MODEL.WEIGHTS`, or None for a local BN file that must be converted to GN.

    Raises:
        InputError: if no weights fit, and none can be converted.
    """
    backbone = split_norm(norm)[0]
    own = norm_in(describe(weights)) if weights else None
    if own is None or is_group_norm(own) == is_group_norm(backbone):
        return weights
    if backbone == "GN" and Path(weights).is_file():
        return None
    depth = cfg.MODEL.RESNETS.DEPTH
    if backbone == "GN" and backbone_section(cfg) == "RESNETS" and depth in (50, 101):
        return f"catalog://ImageNetPretrained/FAIR/R-{depth}-GN"
    raise InputError(f"{weights} has {own}: give weights for {norm} with --init {norm}=FILE")


def holds_detector(weights: str) -> bool:
    """Whether a local file holds more of a detector than its backbone."""
    if not Path(weights).is_file():
        return False
    names = read_weights(Path(weights), device="meta").tensors
    return any(part_of(name) in PARTS and part_of(name) not in BACKBONE_PARTS for name in names)


def extract_backbone(weights: Path, cfg: CfgNode, output: Path) -> Path:
    """Write the backbone of a detector to a file of its own, so that all norms start alike.

    Args:
        weights: file of the detector.
        cfg: sets the facts that the file lacks.
        output: folder of the result.

    Returns:
        The new file. Its name contains a hash of the detector, so an existing one is reused.
    """
    digest = sha256(weights.read_bytes()).hexdigest()[:12]
    path = (output / f"{weights.stem}_backbone_{digest}.pth").resolve()
    if not path.is_file():
        output.mkdir(parents=True, exist_ok=True)
        conversion = convert(read_weights(weights), opts=as_opts(missing_facts(str(weights), cfg)))
        conversion.check_complete([], [])
        save_backbone(conversion.tensors, conversion.cfg, path)
    return path


def convert_to_gn(
    weights: Path,
    cfg: CfgNode,
    grouping: Mapping[str, Any],
    images: Sequence[Path],
    output: Path,
    distill_steps: int,
) -> Path:
    """Convert a BN backbone to GN, calibrated and distilled on images without labels.

    Args:
        weights: file of the BN backbone.
        cfg: sets the facts that the file lacks.
        grouping: `MODEL.GROUP_NORM` keys of the GN backbone.
        images: of the training set; `NUM_IMAGES` of them are sampled.
        output: folder of the result.
        distill_steps: steps of distillation after calibration.

    Returns:
        The converted file. Its name contains a hash of everything that decides its content, so an
        existing one is reused.
    """
    missing = missing_facts(str(weights), cfg)
    sample = random.Random(0).sample(sorted(images), min(NUM_IMAGES, len(images)))
    settings = json.dumps([dict(grouping), missing, distill_steps])
    digest = sha256(settings.encode())
    for file in (weights, *sample):
        digest.update(sha256(file.read_bytes()).digest())
    path = (output / f"{weights.stem}_gn_{digest.hexdigest()[:12]}.pth").resolve()
    if path.is_file():
        return path
    output.mkdir(parents=True, exist_ok=True)
    conversion = convert(read_weights(weights), opts=as_opts(missing))
    conversion.check_complete([], [])
    if torch.cuda.is_available():
        conversion.cfg.MODEL.DEVICE = "cuda"
    torch.manual_seed(0)
    state = path.with_suffix(".partial")
    to_group_norm(conversion, as_opts(grouping), sample, distill_steps, state)
    with write_whole(path.with_suffix(ERRORS)) as text:
        text.write(conversion.errors + "\n")
    save_backbone(conversion.tensors, conversion.cfg, path, conversion.recipe)
    return path


def conversion_errors(weights: str) -> str:
    """The feature errors of a backbone that `convert_to_gn` has written; "" for other weights."""
    if not Path(weights).is_file():
        return ""
    path = Path(weights).with_suffix(ERRORS)
    return path.read_text().strip() if path.is_file() else ""
