"""Conversion of a backbone from any source to Detectron2's names and layout."""

from collections.abc import Container, Mapping, Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone
from torch import Tensor

from ..config import add_gn_config, parse_opts, value_of
from ..errors import InputError
from ..modeling.norm import backbone_norm, backbone_section, is_group_norm
from .conversion import Conversion
from .facts import (
    GROUP_NORM,
    NORM,
    PIXELS,
    STANDARDIZATION,
    STRIDE,
    VGG_DEPTH,
    VGG_NORM,
    Facts,
    architecture,
    recorded_facts,
)
from .names import AUTHORS, CAFFE_PIXELS, SOURCES, TORCH_PIXELS, find_source, rename
from .read import WeightsFile
from .recipe import recipe_in

# Threshold for the median of |mean| / (std / sqrt(n)) over filters of n weights. Random filters
# have 0.67, and trained ones more; with weight standardisation the mean decays towards 0
STANDARDIZED_BELOW = 0.35


def convert(
    file: WeightsFile, source: str = "auto", opts: Sequence[str] = (), prefix: str | None = None
) -> Conversion:
    """Convert a backbone to Detectron2's tensor names, and derive its config keys.

    Args:
        file: the file that holds the backbone.
        source: a key of `SOURCES`, or "auto" to detect it from the names.
        opts: `KEY VALUE` pairs that the file does not determine, such as `INPUT.FORMAT BGR`.
        prefix: prefix of the network's names, if the file holds several networks.

    Raises:
        InputError: if Detectron2's ResNet does not support the network, as with pre-activation,
            deep stems or undeclared weight standardisation; if groups do not divide the channels,
            values are invalid, or `opts` contradict the file.
    """
    detected = find_source(file.tensors)
    source = detected if source == "auto" else source
    renamed = rename(file.tensors, SOURCES[source], prefix)
    shape = architecture(renamed.tensors)
    if not shape:
        raise InputError(
            "its layers are not those of ResNet-18, 34, 50, 101 or 152, or VGG-11, 13, 16 or 19; "
            "its first tensor is "
            f"{min(file.tensors)}"
        )
    recorded = recorded_facts(file)
    usual = usual_facts(file, source, renamed.norm, shape, opts)
    vgg = VGG_DEPTH in shape
    norm: Facts = {VGG_NORM: renamed.norm or ""} if vgg else {NORM: renamed.norm}
    facts = usual | norm | recorded | shape
    if STRIDE not in facts and not vgg:
        # Only the BN models of MSRA and Detectron have the stride on the 1x1 convolution
        wide = facts.get("MODEL.RESNETS.NUM_GROUPS", 1) > 1
        facts[STRIDE] = renamed.norm != "GN" and not wide
    cfg = backbone_config(facts, opts)
    if is_group_norm(backbone_norm(cfg)) != (renamed.norm == "GN"):
        raise InputError(
            f"{VGG_NORM if vgg else NORM} {backbone_norm(cfg)} contradicts the file, which has "
            f"{renamed.norm}: to convert BN to GN, use --norm GN --calibrate IMAGES"
        )
    assumed = assumed_facts(cfg, {*opts, *recorded})
    unclear = not vgg and STANDARDIZATION not in {*opts, *recorded}
    if unclear and looks_standardized(renamed.tensors):
        raise InputError(
            "its filters have mean 0, as after training with weight standardisation: add "
            f"{STANDARDIZATION} True, or False if it was trained without"
        )
    added = _add_statistics(renamed.tensors) if renamed.norm == "FrozenBN" else []
    tensors, missing = _take(renamed.tensors, build_network(cfg))
    unknown = [*renamed.unknown, *(name for name in renamed.tensors if name not in tensors)]
    unknown = [name for name in unknown if name not in {m.split(" ")[0] for m in missing}]
    dropped, others = renamed.dropped, file.others
    return Conversion(
        *(tensors, cfg, source, dropped, missing, unknown, added, assumed, others),
        prefix=renamed.prefix,
        recipe=recipe_in(file),
    )


def assumed_facts(cfg: CfgNode, known: Container[str]) -> Facts:
    """The values in `cfg` of keys that neither file nor user set; `known` holds those they set."""
    vgg = backbone_section(cfg) == "VGG"
    keys = [*PIXELS] if vgg else [STRIDE, *PIXELS]
    if is_group_norm(backbone_norm(cfg)):
        # A file without running statistics is assumed to have GN, with Detectron's grouping
        keys = [VGG_NORM if vgg else NORM, *GROUP_NORM[: GROUP_NORM[1] not in known], *keys]
    return {key: value_of(cfg, key) for key in keys if key not in known}


def usual_facts(
    file: WeightsFile, source: str, norm: str | None, shape: Facts, opts: Sequence[str]
) -> Facts:
    """The usual config keys for files of a source, given their norm and `architecture`."""
    facts = dict(SOURCES[source].facts)
    if source == "detectron2":
        facts |= AUTHORS.get(file.author, {})
    if source == "mmdetection" and STANDARDIZATION in opts:
        facts |= TORCH_PIXELS  # those of GN+WS come from PyTorch, those of GN from Detectron
    if source == "detectron" and norm == "BN" and shape.get("MODEL.RESNETS.NUM_GROUPS", 1) > 1:
        facts["MODEL.PIXEL_STD"] = TORCH_PIXELS["MODEL.PIXEL_STD"][::-1]  # X-101-32x8d
    given = parse_opts(opts)
    if given.get("INPUT.FORMAT", facts["INPUT.FORMAT"]) != facts["INPUT.FORMAT"]:
        # Mean and std have the channel order of INPUT.FORMAT
        facts |= {key: facts[key][::-1] for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")}
    return facts


def backbone_config(facts: Facts, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a backbone with the outputs of all stages, on the CPU, and without frozen ones.

    Raises:
        InputError: for unknown keys or invalid values.
    """
    cfg = get_cfg()
    add_gn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    # Calibration needs the output of each norm layer before the ReLU
    cfg.MODEL.GROUP_NORM.IMPL = "native"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if VGG_DEPTH in facts:
        cfg.MODEL.BACKBONE.NAME = "build_gn_vgg_backbone"
        cfg.MODEL.VGG.OUT_FEATURES = ["conv2", "conv3", "conv4", "conv5"]
    merge_pairs(cfg, [word for pair in facts.items() for word in pair])
    merge_pairs(cfg, opts)
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(f'INPUT.FORMAT {cfg.INPUT.FORMAT}: must be "RGB" or "BGR"')
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = cfg.MODEL[key]
        if len(values) != 3 or (key == "PIXEL_STD" and min(values) <= 0):
            raise InputError(f"MODEL.{key} {values}: give three values, above 0 for PIXEL_STD")
    return cfg


def merge_pairs(cfg: CfgNode, pairs: Sequence[str]) -> None:
    """Set config keys in place, from a flat list of keys and values.

    Raises:
        InputError: for unknown keys or invalid values.
    """
    try:
        cfg.merge_from_list(list(pairs))
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"{' '.join(map(str, pairs))}: {error}") from None


def build_network(cfg: CfgNode, tensors: Mapping[str, Tensor] | None = None) -> Backbone:
    """Build the backbone of a config, in evaluation mode, on `MODEL.DEVICE`.

    Args:
        cfg: from `backbone_config`.
        tensors: its weights; tensors that the backbone does not have are ignored. Without weights,
            the backbone is on PyTorch's meta device.

    Raises:
        InputError: if there is no such backbone, or groups do not divide its channels.
    """
    try:
        with torch.device("meta"):
            network = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    except (AssertionError, KeyError) as error:
        raise InputError(f"Detectron2 has no such ResNet: {error}") from None
    if tensors is None:
        return network
    own = {name: tensors[name].clone() for name in network.state_dict() if name in tensors}
    network.load_state_dict(own, strict=False, assign=True)
    return network.to(cfg.MODEL.DEVICE)


def fold_input(conversion: Conversion) -> None:
    """Rewrite the first convolution, in place, for BGR images and a pixel std of 1.

    These are Detectron2's defaults. The pixel mean keeps its value, in BGR order: because of zero
    padding, no change of the weights is equivalent to another mean.

    Raises:
        InputError: for standardised filters, which ignore the scale of the weights.
    """
    keys, tensors = conversion.cfg, conversion.tensors
    first = "conv1_1.weight" if "conv1_1.weight" in tensors else "stem.conv1.weight"
    weight = tensors[first]
    if keys.MODEL.RESNETS.WEIGHT_STANDARDIZATION:
        raise InputError("--fold-input does not support weight standardisation: leave it out")
    std = torch.tensor(keys.MODEL.PIXEL_STD, dtype=torch.float64).view(1, 3, 1, 1)
    weight = weight.double() / std
    if keys.INPUT.FORMAT == "RGB":
        weight = weight.flip(1)
        keys.MODEL.PIXEL_MEAN = list(keys.MODEL.PIXEL_MEAN)[::-1]
    tensors[first] = weight.float().contiguous()
    keys.INPUT.FORMAT, keys.MODEL.PIXEL_STD = "BGR", CAFFE_PIXELS["MODEL.PIXEL_STD"]


def looks_standardized(tensors: dict[str, Tensor]) -> bool:
    """Whether the filters have means near 0, as after training with weight standardisation.

    Its gradient does not change the mean of a filter, so weight decay moves the mean to 0.
    """
    ratios = []
    for name, weight in tensors.items():
        if weight.dim() == 4 and not name.startswith("stem"):
            std, mean = torch.std_mean(weight.float().flatten(1), dim=1)
            ratios.append(mean.abs() * weight[0].numel() ** 0.5 / std.clamp(min=1e-12))
    return bool(torch.cat(ratios).median() < STANDARDIZED_BELOW)


def _take(tensors: dict[str, Tensor], network: Backbone) -> tuple[dict[str, Tensor], list[str]]:
    """Select the tensors of a backbone; also return the names that are missing or misshapen.

    Raises:
        InputError: for invalid values: integers, infinities, NaN or negative variances.
    """
    taken, missing = {}, []
    for name, wanted in network.state_dict().items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape == wanted.shape:
            taken[name] = tensor.float()
            if not tensor.is_floating_point():
                raise InputError(f"its {name} is {tensor.dtype}: give weights in floating point")
            if not taken[name].isfinite().all():
                raise InputError(f"its {name} is infinite or NaN: give an earlier checkpoint")
            if name.endswith("running_var") and (taken[name] < 0).any():
                raise InputError(f"its {name} is negative: give an intact file")
        elif tensor is not None:
            missing.append(f"{name} of shape {(*wanted.shape,)} (the file has {(*tensor.shape,)})")
        elif not name.endswith("num_batches_tracked"):
            missing.append(name)
    return taken, missing


def _add_statistics(tensors: dict[str, Tensor]) -> list[str]:
    """Add running statistics that make FrozenBN equal to its affine transform."""
    added = []
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        layer = name.removesuffix("weight")
        gamma = tensors[name]
        for statistic, value in (("running_mean", 0.0), ("running_var", 1.0 - 1e-5)):
            tensors[layer + statistic] = torch.full_like(gamma, value)
            added.append(layer + statistic)
    return added
