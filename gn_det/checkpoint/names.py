"""How each source names the tensors of a ResNet, and what Detectron2 calls them."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor

from ..errors import InputError

# A tensor of Detectron2's ResNet
TRUNK = re.compile(
    r"(stem\.conv1|res[2-5]\.\d+\.(conv[1-3]|shortcut))\."
    r"(weight|norm\.(weight|bias|running_mean|running_var))"
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
    """One way of naming, and what holds for all files of it unless their owner says otherwise."""

    # A name that only files of this source have
    mark: str
    # From the source's name to Detectron2's; any other name stays as it is
    rename: Callable[[str], str]
    # Config keys that must agree with the weights
    facts: Mapping[str, Any] = field(default_factory=dict)
    # Whether the stem may have a bias that no network uses
    unused_stem_bias: bool = False
    # Whether convolutions are (height, width, in, out), as in TensorFlow
    channels_last: bool = False
    # Whether names may begin with those of modules that the network stands in
    prefixed: bool = False


def _substitute(*rules: tuple[str, str]) -> Callable[[str], str]:
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

_TORCH_TRUNK = r"^((?:[\w-]+\.)*)layer1\.0\.conv1\.weight$"
# Of several networks in a file, what is taken: MoCo's query encoder, say
_USUAL_PREFIX = r"(module\.|backbone\.|body\.|encoder(_q)?\.|model\.|resnet\.)*"
_TORCH = Source(_TORCH_TRUNK, _from_torch, TORCH_PIXELS | _STRIDE_3X3, prefixed=True)

# In the order in which they are looked for
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
    "detectron2": Source(r"^([\w.]+\.)?res2\.0\.conv1\.weight$", _OWN_NAMES, CAFFE_PIXELS, True),
}

# Facts of files in Detectron2's own format, by the `__author__` that stands in them
AUTHORS = {"torchvision": TORCH_PIXELS | _STRIDE_3X3, "MOCO": TORCH_PIXELS | _STRIDE_3X3}

# Networks that look like ResNets and cannot be computed by Detectron2's
_UNFIT = {
    r"standardized_conv2d|^stages\.\d+\.blocks\.\d+\.(conv|norm)\d\."
    r"|(^|/)preact/|bnlast|block1[/.]unit0?1": (
        "it is a pre-activation network (ResNet v2, BiT), whose norms stand before its "
        "convolutions: Detectron2's ResNet cannot compute it"
    ),
    r"^(\w+\.)*conv1\.[03]\.weight$": (
        "its stem is three convolutions (ResNet-C or -D): Detectron2's ResNet has one of 7x7"
    ),
}

# What a classification network has beside its trunk
CLASSIFIER = (
    r"(^|\.)(fc|fc1000|linear|classifier|head\.fc|pred|last_linear)(\.\d)?"
    r"[./](weight|bias|W|b)(:0)?$"
)
STEM_BIAS = r"^stem\.conv1\.bias$"
# Why a tensor of the file is left out, by its name in the file or Detectron2's
_DROPPED = {
    CLASSIFIER: "the classifier",
    r"num_batches_tracked$": "counters of training",
    r"_momentum$|(^|/)(learning_rate|global_step)": "the optimizer's",
    r"^(proposal_generator|roi_heads?|mask_head|top_block|anchor_generator|sem_seg_head|rpn_head"
    r"|neck|bbox_head|data_preprocessor|rpn|fastrcnn|maskrcnn|head)[./]|^(fpn|pixel_)"
    r"|^(conv_rpn|rpn_|bbox_pred|cls_score|fc[67]_|head_conv|_?\[mask\]|_mask_|mask_fcn|conv5_mask"
    r"|conv_fcn|kps_score|retnet_)": "parts of a detector",
}


def find_source(names: Iterable[str]) -> str:
    """Which of `SOURCES` has named these tensors.

    Raises:
        InputError: for networks that cannot be brought over, and names of no known source.
    """
    names = list(names)
    for pattern, why in _UNFIT.items():
        if any(re.search(pattern, name) for name in names):
            raise InputError(why)
    for source, rule in SOURCES.items():
        if any(re.search(rule.mark, name) for name in names):
            return source
    known = ", ".join(SOURCES)
    raise InputError(f"no ResNet that {known} would name so: it begins with {min(names)}")


@dataclass
class Renamed:
    """The trunk's tensors under Detectron2's names, and what became of all others."""

    tensors: dict[str, Tensor]
    # name in the file -> why it was left out
    dropped: dict[str, str]
    unknown: list[str]
    # "BN", "FrozenBN" for BN that is fused into its affine map, "GN" for norms without statistics
    norm: str | None = None


def find_prefix(names: Iterable[str], wanted: str | None = None) -> str:
    """What stands before each of the ResNet's names in a file of PyTorch's, such as `module.`.

    Args:
        wanted: the one to take of several.

    Raises:
        InputError: if there are several networks and none is wanted, or not the one that is.
    """
    found = dict.fromkeys(m[1] for name in names if (m := re.match(_TORCH_TRUNK, name)))
    if wanted is not None and wanted in found:
        return wanted
    usual = [prefix for prefix in found if re.fullmatch(_USUAL_PREFIX, prefix)] or [*found]
    if wanted is not None or len(usual) != 1:
        told = ", ".join(f'"{prefix}"' for prefix in found) or "no ResNet of PyTorch's"
        raise InputError(f"its ResNets' names begin with {told}: add --prefix with one of these")
    return usual[0]


def rename(tensors: Mapping[str, Tensor], source: Source, prefix: str | None = None) -> Renamed:
    """Give the tensors of a file the names and the layout that Detectron2's ResNet has.

    Args:
        prefix: as `find_prefix`'s `wanted`; what does not begin with it is then left out.

    Raises:
        InputError: as `find_prefix`, where names have prefixes.
    """
    result = Renamed({}, {}, [])
    taken = find_prefix(tensors, prefix) if source.prefixed or prefix is not None else ""
    for name, tensor in tensors.items():
        if prefix and not name.startswith(prefix):
            result.dropped[name] = f"not of {prefix}"
            continue
        new = source.rename(name.removeprefix(taken))
        if TRUNK.fullmatch(new) and new in result.tensors:
            result.unknown.append(name)  # a second network in the same file
            continue
        if TRUNK.fullmatch(new):
            if source.channels_last and tensor.dim() == 4:
                tensor = tensor.permute(3, 2, 0, 1).contiguous()
            result.tensors[new] = tensor
            continue
        if new == "stem.conv1.bias" and source.unused_stem_bias:
            result.dropped[name] = "a bias that Detectron does not use either"
            continue
        for pattern, why in _DROPPED.items():
            if re.search(pattern, new) or re.search(pattern, name):
                result.dropped[name] = why
                break
        else:
            result.unknown.append(name)
    result.norm = _norm(tensors, result.tensors)
    return result


def norm_of(names: Iterable[str]) -> str | None:
    """The norm of a file's trunk, as `Renamed.norm`, or None for names of no known source."""
    names = list(names)
    try:
        source = SOURCES[find_source(names)]
        prefix = find_prefix(names) if source.prefixed else ""
    except InputError:
        return None
    return _norm(names, (source.rename(name.removeprefix(prefix)) for name in names))


def _norm(names: Iterable[str], renamed: Iterable[str]) -> str | None:
    trunk = [name for name in renamed if TRUNK.fullmatch(name)]
    if any(name.endswith("norm.running_mean") for name in trunk):
        return "BN"
    if any(name.endswith("_bn_s") for name in names):
        return "FrozenBN"
    return "GN" if any(name.endswith("norm.weight") for name in trunk) else None
