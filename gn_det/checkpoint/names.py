"""Tensor names of a backbone in each source, and their translation to Detectron2's names."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor

from ..errors import InputError
from .vgg_names import fold_biases, number_names

# The name of a tensor in Detectron2's ResNet, or in gn_det's VGG
BACKBONE_TENSOR = re.compile(
    r"(stem\.conv1|res[2-5]\.\d+\.(conv[1-3]|shortcut)|conv[1-5]_[1-4](?=\.(weight|norm)))\."
    r"(weight|norm\.(weight|bias|running_mean|running_var))|conv[1-5]_[1-4]\.bias"
)

CAFFE_PIXELS = {
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [103.530, 116.280, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}
TORCH_PIXELS = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
}
_STRIDE_3X3 = {"MODEL.RESNETS.STRIDE_IN_1X1": False}


@dataclass(frozen=True)
class Source:
    """A naming scheme, and the config keys that its files usually need."""

    # Pattern of a name that only files of this source contain
    mark: str
    # Translates a name to Detectron2's; returns unknown names unchanged
    rename: Callable[[str], str]
    # Config keys that usually agree with files of this source
    facts: Mapping[str, Any] = field(default_factory=dict)
    # Whether files may contain a stem bias that the source's networks do not use
    unused_stem_bias: bool = False
    # Whether filters have the shape (height, width, in, out), as in TensorFlow
    channels_last: bool = False
    # Whether names may have a prefix, such as "module.", from enclosing modules
    prefixed: bool = False
    # Whether layers only have numbers, so that their names depend on all other layers
    numbered: bool = False


def _substitute(*rules: tuple[str, str]) -> Callable[[str], str]:
    """A function that applies `re.sub` with each (pattern, replacement) in order."""

    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def _from_torch(name: str) -> str:
    name = re.sub(r"^layer(\d)\.", lambda stage: f"res{int(stage[1]) + 1}.", name)
    return _TORCH_RULES(name)


_TORCH_RULES = _substitute(
    (r"^(conv1|bn1|gn1)\.", r"stem.\1."),
    (r"\.(?:bn|gn)(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def _from_tensorpack(name: str) -> str:
    name = re.sub(r"^group(\d)/block", lambda stage: f"res{int(stage[1]) + 2}.", name)
    return _TENSORPACK_RULES(name)


_TENSORPACK_RULES = _substitute(
    (r":0$", ""),
    (r"^conv0/", "stem.conv1/"),
    (r"/convshortcut/", "/shortcut/"),
    (r"/W$", ".weight"),
    (r"/(?:bn|gn)/gamma$", ".norm.weight"),
    (r"/(?:bn|gn)/beta$", ".norm.bias"),
    (r"/bn/mean/EMA$", ".norm.running_mean"),
    (r"/bn/variance/EMA$", ".norm.running_var"),
    (r"/(conv\d|shortcut)", r".\1"),
)

_OWN_NAMES = _substitute(
    (r"^(module\.)?(backbone\.(bottom_up\.)?|roi_heads\.(?=res5\.))", ""),
)

_TORCH_BACKBONE = r"^((?:[\w-]+\.)*)layer1\.0\.conv1\.weight$"
# If a file holds several networks, the one with such a prefix is used, as MoCo's query encoder
_USUAL_PREFIX = r"(module\.|backbone\.|body\.|encoder(_q)?\.|model\.|resnet\.)*"
_TORCH = Source(_TORCH_BACKBONE, _from_torch, TORCH_PIXELS | _STRIDE_3X3, prefixed=True)

# `find_source` tries them in this order
SOURCES = {
    "mmdetection": Source(
        r"^([\w-]+\.)*layer1\.0\.gn1\.weight$",
        _from_torch,
        CAFFE_PIXELS | _STRIDE_3X3,
        prefixed=True,
    ),
    "torchvision": _TORCH,
    "timm": _TORCH,
    "groupnorm-reproduce": _TORCH,
    "detectron": Source(
        r"^res2_0_branch2a_w$",
        lambda name: convert_basic_c2_names([name])[0],
        CAFFE_PIXELS,
        unused_stem_bias=True,
    ),
    "tensorpack": Source(
        r"^group0/block0/conv1/W(:0)?$",
        _from_tensorpack,
        {
            "INPUT.FORMAT": "BGR",
            "MODEL.PIXEL_MEAN": TORCH_PIXELS["MODEL.PIXEL_MEAN"][::-1],
            "MODEL.PIXEL_STD": TORCH_PIXELS["MODEL.PIXEL_STD"][::-1],
            **_STRIDE_3X3,
        },
        channels_last=True,
    ),
    "detectron2": Source(
        r"^([\w.]+\.)?(res2\.0\.conv1|conv1_1)\.weight$", _OWN_NAMES, CAFFE_PIXELS, True
    ),
    # Of torchvision and timm
    "vgg": Source(r"^([\w-]+\.)*features\.0\.weight$", _OWN_NAMES, TORCH_PIXELS, numbered=True),
}

# Config keys of files in Detectron2's format, by the file's `__author__` entry
AUTHORS = {"torchvision": TORCH_PIXELS | _STRIDE_3X3, "MOCO": TORCH_PIXELS | _STRIDE_3X3}

# Pattern of a tensor name -> why Detectron2's ResNet cannot represent the network
_UNFIT = {
    r"standardized_conv2d|^stages\.\d+\.blocks\.\d+\.(conv|norm)\d\."
    r"|(^|/)preact/|bnlast|block1[/.]unit0?1": (
        "it is a pre-activation network (ResNet v2, BiT), with norms before convolutions: "
        "Detectron2's ResNet does not support this"
    ),
    r"^(\w+\.)*conv1\.[03]\.weight$": (
        "its stem has three convolutions (ResNet-C or -D): Detectron2's ResNet has one 7x7 "
        "convolution"
    ),
}

# Tensors of a classification network that are not in the backbone
CLASSIFIER = (
    r"(^|\.)(pre_logits\.fc[12]|fc|fc1000|linear|classifier|head\.fc|pred|last_linear)(\.\d)?"
    r"[./](weight|bias|W|b)(:0)?$"
)
STEM_BIAS = r"^stem\.conv1\.bias$"
# Pattern of the original or new name -> why the tensor is dropped
_DROPPED = {
    CLASSIFIER: "classifier",
    r"num_batches_tracked$": "batch counters",
    r"_momentum$|(^|/)(learning_rate|global_step)": "optimizer state",
    r"^(proposal_generator|roi_heads?|mask_head|top_block|anchor_generator|sem_seg_head|rpn_head"
    r"|neck|bbox_head|data_preprocessor|rpn|fastrcnn|maskrcnn|head)[./]|^(fpn|pixel_)"
    r"|^(conv_rpn|rpn_|bbox_pred|cls_score|fc[67]_|head_conv|_?\[mask\]|_mask_|mask_fcn|conv5_mask"
    r"|conv_fcn|kps_score|retnet_)": "other detector parts",
}


def find_source(names: Iterable[str]) -> str:
    """Find the source of a file from the names of its tensors.

    Returns:
        a key of `SOURCES`.

    Raises:
        InputError: if Detectron2 does not support the network, or no source uses such names.
    """
    names = list(names)
    for pattern, reason in _UNFIT.items():
        if any(re.search(pattern, name) for name in names):
            raise InputError(reason)
    for source, rule in SOURCES.items():
        if any(re.search(rule.mark, name) for name in names):
            return source
    known = ", ".join(SOURCES)
    raise InputError(
        f"its tensors, such as {min(names)}, do not have the names of a ResNet or VGG from {known}"
    )


@dataclass
class Renamed:
    """The tensors of a backbone under Detectron2's names, and all other names of the file."""

    tensors: dict[str, Tensor]
    # Name in the file -> why the tensor is dropped
    dropped: dict[str, str]
    # Names in the file that are neither dropped nor part of the backbone
    unknown: list[str]
    # "BN", "FrozenBN" for BN fused into an affine transform, "GN" for norms without statistics
    norm: str | None = None
    # Prefix of the network's names, such as "module."
    prefix: str = ""


def find_prefix(names: Iterable[str], wanted: str | None = None) -> str:
    """Find the prefix of a ResNet's tensor names in a PyTorch file, such as "module.".

    Args:
        names: all names of the file.
        wanted: the prefix to use if the file holds several networks, or its last parts, such as
            "encoder_q"; None for the usual one.

    Raises:
        InputError: if several networks could be meant, or none has the wanted prefix.
    """
    known = dict.fromkeys(m[1] for name in names if (m := re.match(_TORCH_BACKBONE, name)))
    if wanted is not None and wanted in known:
        return wanted
    if (
        wanted
        and len(ends := [p for p in known if f".{p}".endswith(f".{wanted.strip('.')}.")]) == 1
    ):
        return ends[0]
    usual = [prefix for prefix in known if re.fullmatch(_USUAL_PREFIX, prefix)] or [*known]
    if wanted is not None or len(usual) != 1:
        prefixes = ", ".join(f'"{prefix}"' for prefix in known) or "(none)"
        raise InputError(f"the prefixes of its ResNets are {prefixes}: choose one with --prefix")
    return usual[0]


def rename(tensors: Mapping[str, Tensor], source: Source, prefix: str | None = None) -> Renamed:
    """Convert the tensors of a file to the names and layout of the backbone.

    Args:
        tensors: all tensors of the file, by name.
        source: the naming scheme of the file.
        prefix: as `wanted` of `find_prefix`; tensors without this prefix are dropped.

    Raises:
        InputError: if the prefix is ambiguous or not in the file, as in `find_prefix`.
    """
    result = Renamed({}, {}, [])
    removed = find_prefix(tensors, prefix) if source.prefixed or prefix is not None else ""
    prefix = prefix and removed
    numbered = number_names(tensors) if source.numbered else {}
    for name, tensor in tensors.items():
        if prefix and not name.startswith(prefix):
            result.dropped[name] = f"without prefix {prefix}"
            continue
        new = numbered.get(name) or source.rename(name.removeprefix(removed))
        if BACKBONE_TENSOR.fullmatch(new) and new in result.tensors:
            result.unknown.append(name)  # a second network in the same file
            continue
        if BACKBONE_TENSOR.fullmatch(new):
            if source.channels_last and tensor.dim() == 4:
                tensor = tensor.permute(3, 2, 0, 1).contiguous()
            result.tensors[new] = tensor
            continue
        if new == "stem.conv1.bias" and source.unused_stem_bias:
            result.dropped[name] = "stem bias, which Detectron does not use either"
            continue
        for pattern, reason in _DROPPED.items():
            if re.search(pattern, new) or re.search(pattern, name):
                result.dropped[name] = reason
                break
        else:
            result.unknown.append(name)
    biases = fold_biases(result.tensors)
    original = {new: name for name, new in numbered.items()}
    reason = "bias before a norm, subtracted from BatchNorm's running mean"
    result.dropped |= {original.get(bias, bias): reason for bias in biases}
    result.norm = _norm(tensors, result.tensors)
    result.prefix = removed
    return result


def norm_of(names: Iterable[str]) -> str | None:
    """The norm of a file's backbone as in `Renamed.norm`; None for names of unknown sources."""
    names = list(names)
    try:
        source = SOURCES[find_source(names)]
        prefix = find_prefix(names) if source.prefixed else ""
    except InputError:
        return None
    if source.numbered:
        return _norm(names, number_names(names).values())
    return _norm(names, (source.rename(name.removeprefix(prefix)) for name in names))


def _norm(names: Iterable[str], renamed: Iterable[str]) -> str | None:
    backbone = [name for name in renamed if BACKBONE_TENSOR.fullmatch(name)]
    if any(name.endswith("norm.running_mean") for name in backbone):
        return "BN"
    if any(name.endswith("_bn_s") for name in names):
        return "FrozenBN"
    return "GN" if any(name.endswith("norm.weight") for name in backbone) else None
