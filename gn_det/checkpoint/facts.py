"""Config keys that must agree with a backbone's weights."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..modeling.vgg import STAGES
from .names import CAFFE_PIXELS, SOURCES, TORCH_PIXELS, find_source, rename
from .read import WeightsFile, read_weights

# Config key -> required value; keys without a known value are absent. For the backbone's norm, "BN"
# stands for any norm with BN's tensors (BN, SyncBN, BRN, FrozenBN). "FrozenBN" stands for BN that
# is fused into an affine transform, which only FrozenBN can load.
Facts = dict[str, Any]

NORM = "MODEL.RESNETS.NORM"
VGG_NORM, VGG_DEPTH, VGG_WIDTH = (f"MODEL.VGG.{key}" for key in ("NORM", "DEPTH", "WIDTH"))
NORM_FACTS = (NORM, VGG_NORM)
GROUP_NORM = ("MODEL.GROUP_NORM.NUM_GROUPS", "MODEL.GROUP_NORM.DIM_PER_GP")
PIXELS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
STANDARDIZATION = "MODEL.RESNETS.WEIGHT_STANDARDIZATION"
# Section of the backbone's keys -> all keys that can be recorded in a file of weights
KEYS_OF = {
    "RESNETS": (
        *(NORM, "MODEL.RESNETS.DEPTH", "MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "MODEL.RESNETS.RES2_OUT_CHANNELS"),
        *(STRIDE, STANDARDIZATION, *PIXELS, *GROUP_NORM),
    ),
    "VGG": (VGG_NORM, VGG_DEPTH, VGG_WIDTH, *PIXELS, *GROUP_NORM),
}
KEYS = tuple(dict.fromkeys(key for keys in KEYS_OF.values() for key in keys))
VGG_CONV = re.compile(r"conv(\d)_\d\.weight")
# Number of blocks in res2 to res5 -> depth; ResNet-34 has the same as ResNet-50
BLOCKS: dict[tuple[int, ...], int] = {
    (2, 2, 2, 2): 18,
    (3, 4, 6, 3): 50,
    (3, 4, 23, 3): 101,
    (3, 8, 36, 3): 152,
}

# Source and format of files that Detectron2 loads without conversion
NATIVE = (("detectron2", ".pth"), ("detectron2", ".pkl"), ("detectron", ".pkl"))

_MSRA: Facts = {NORM: "BN", STRIDE: True, **CAFFE_PIXELS}
_GN: Facts = {
    **(_MSRA | {NORM: "GN", STRIDE: False}),
    **{"MODEL.GROUP_NORM.NUM_GROUPS": 32, "MODEL.GROUP_NORM.DIM_PER_GP": -1},
}
_TORCHVISION: Facts = {NORM: "BN", STRIDE: False, **TORCH_PIXELS}
_RESNEXT_STD = {"MODEL.PIXEL_STD": [57.375, 57.120, 58.395]}
# Backbones below ImageNetPretrained/, from Detectron2's MODEL_ZOO.md, catalog.py and configs
PUBLISHED: dict[str, Facts] = {
    name: {"MODEL.RESNETS.DEPTH": depth, STANDARDIZATION: False, **facts}
    for name, depth, facts in (
        ("MSRA/R-50", 50, _MSRA),
        ("MSRA/R-101", 101, _MSRA),
        ("FAIR/R-50-GN", 50, _GN),
        ("FAIR/R-101-GN", 101, _GN),
        (
            "FAIR/X-101-32x8d",
            101,
            _MSRA | {STRIDE: False} | _RESNEXT_STD,
        ),
        ("torchvision/R-50", 50, _TORCHVISION),
    )
}


def describe(weights: str) -> Facts:
    """The config keys that must agree with the weights of `MODEL.WEIGHTS`.

    A published file is recognised by its address, without a download. For a local file, the keys
    come from gn_det's record in it, or else from its tensors.

    Args:
        weights: path or address, as in `MODEL.WEIGHTS`.

    Returns:
        the known keys; empty if nothing is known.

    Raises:
        InputError: if the file exists and cannot be read.
    """
    path = Path(weights.partition("?")[0])
    if path.is_file():
        return describe_file(path)
    match = re.search(r"://.*ImageNetPretrained/(?:\d+/)?(.*?)(?:\.pkl)?$", weights)
    for name, facts in PUBLISHED.items():
        # Detectron's own addresses have a number instead of FAIR
        if match and match[1] in (name, name.removeprefix("FAIR/")):
            if facts[NORM] == "BN" and not re.match("detectron2://|.*/detectron2/", weights):
                return facts | {
                    NORM: "FrozenBN",
                    "MODEL.PIXEL_STD": CAFFE_PIXELS["MODEL.PIXEL_STD"],
                }
            return dict(facts)
    return {}


def describe_file(path: Path) -> Facts:
    """The keys that gn_det recorded in a file, or else its architecture and norm.

    Returns:
        the known keys; empty if the file does not hold a backbone that gn_det knows.

    Raises:
        InputError: if the file cannot be read.
    """
    file = read_weights(path, device="meta")
    try:
        facts = recorded_facts(file)
    except InputError as error:
        raise InputError(f"{path} cannot be read as weights: {error}") from None
    if facts:
        return facts
    try:
        renamed = rename(file.tensors, SOURCES[find_source(file.tensors)])
    except InputError:
        return {}  # not a supported backbone
    shape = architecture(renamed.tensors)
    if VGG_DEPTH in shape:
        return shape | {VGG_NORM: renamed.norm or ""}
    return shape | ({NORM: renamed.norm} if renamed.norm else {})


def norm_in(facts: Facts) -> str | None:
    """The norm of the backbone; None if it is not known."""
    return facts.get(VGG_NORM, facts.get(NORM))


def recorded_facts(file: WeightsFile) -> Facts:
    """The keys that gn_det recorded in a file; empty for files of other programs.

    Raises:
        InputError: if a recorded value is invalid.
    """
    facts = {key: file.facts[key] for key in KEYS if key in file.facts}
    for key, value in facts.items():
        if not _is_valid(key, value):
            raise InputError(f"its record of {key} is invalid: convert the backbone again")
    if len(facts.keys() & {*GROUP_NORM}) == 1:
        raise InputError(f"its record of {GROUP_NORM[0]} is invalid: convert the backbone again")
    return facts


def _is_valid(key: str, value: Any) -> bool:
    """Whether a value has the type and range of its key."""
    if key in NORM_FACTS:
        return type(value) is str and re.fullmatch(r"\w{0,12}", value) is not None
    if key == PIXELS[0]:
        return value in ("RGB", "BGR") if type(value) is str else False
    if key in PIXELS:
        numbers = type(value) is list and len(value) == 3
        return numbers and all(type(v) in (int, float) and abs(v) < 1e6 for v in value)
    if key in (STRIDE, STANDARDIZATION):
        return type(value) is bool
    return type(value) is int and -1 <= value < 2**16


def architecture(tensors: Mapping[str, Tensor]) -> Facts:
    """Derive the architecture keys of a backbone from its tensors under Detectron2's names.

    Returns:
        depth and widths; empty if there is no ResNet or VGG with these numbers of layers.
    """
    if "conv1_1.weight" in tensors:
        layers = Counter(match[1] for name in tensors if (match := VGG_CONV.fullmatch(name)))
        counts = tuple(layers[str(stage)] for stage in range(1, 6))
        depths = {stages: depth for depth, stages in STAGES.items()}
        width = len(tensors["conv1_1.weight"])
        return {VGG_DEPTH: depths[counts], VGG_WIDTH: width} if counts in depths else {}
    blocks = tuple(
        len({name.split(".")[1] for name in tensors if name.startswith(f"{stage}.")})
        for stage in ("res2", "res3", "res4", "res5")
    )
    basic = "res2.0.conv3.weight" not in tensors
    depth = 34 if basic and blocks == (3, 4, 6, 3) else BLOCKS.get(blocks)
    last = f"res2.0.conv{2 if basic else 3}.weight"
    required = {"stem.conv1.weight", "res2.0.conv2.weight", last}
    if depth is None or basic != (depth in (18, 34)) or not required <= tensors.keys():
        return {}
    facts: Facts = {"MODEL.RESNETS.DEPTH": depth}
    facts["MODEL.RESNETS.STEM_OUT_CHANNELS"] = len(tensors["stem.conv1.weight"])
    facts["MODEL.RESNETS.RES2_OUT_CHANNELS"] = len(tensors[last])
    if not basic:
        width, per_group = tensors["res2.0.conv2.weight"].shape[:2]
        facts["MODEL.RESNETS.NUM_GROUPS"] = width // per_group
        facts["MODEL.RESNETS.WIDTH_PER_GROUP"] = per_group
    return facts


def needs_conversion(weights: str) -> str | None:
    """The source of a local file that Detectron2 cannot load without conversion.

    Args:
        weights: path or address, as in `MODEL.WEIGHTS`.

    Returns:
        a key of `SOURCES`; None if Detectron2 can load the file or nothing is known of it.
    """
    path = Path(weights.partition("?")[0])
    if not path.is_file():
        return None
    try:
        source = find_source(read_weights(path, device="meta").tensors)
    except InputError:
        return None
    return None if (source, path.suffix) in NATIVE else source
