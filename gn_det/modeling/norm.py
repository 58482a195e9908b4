"""Norm layers from Detectron2's `NORM` keys."""

from collections.abc import Callable
from functools import partial

from detectron2.config import CfgNode
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from ..errors import InputError
from ..layers import BatchRenorm2d, GroupNorm
from .parts import BACKBONE_PARTS, part_of
from .weight_norm import normalize_weights

Norm = str | Callable[[int], nn.Module]
# Part of the model -> the config key of its norm; that of the backbone depends on its kind
NORM_KEYS = {
    "backbone": "MODEL.RESNETS.NORM",
    "FPN": "MODEL.FPN.NORM",
    "box head": "MODEL.ROI_BOX_HEAD.NORM",
    "mask head": "MODEL.ROI_MASK_HEAD.NORM",
}


# Detectron2's LayerNorm, over the channels at each position; its own name "LN" is the paper's here
POINTWISE = "LN2d"
POINTWISE_EPSILON = 1e-6
# Batch Renormalization
RENORM = "BRN"
# Weight normalization, of backbones in pretraining
WEIGHT_NORM = "WN"


def get_norm(cfg: CfgNode, norm: str, layer_name: str) -> Norm:
    """Return the `norm` argument for a Detectron2 module.

    Args:
        cfg: a config that `add_gn_config` was called on.
        norm: the value of a `NORM` key. "GN", "LN" and "IN" follow the paper's Figure 2: G groups,
            one group, and one channel per group. "LN2d" is the LayerNorm at each position that
            Detectron2 calls "LN". "BRN" is Batch Renormalization. Other names, such as "",
            "FrozenBN", "BN" and "SyncBN", are Detectron2's own.
        layer_name: name in the model of the layer that gets the norm. Outside the ResNet,
            `MODEL.GROUP_NORM.HEADS_DIM_PER_GP` or `HEADS_NUM_GROUPS` applies. Error messages begin
            with this name.

    Returns:
        a function that builds the layer from a number of channels, or, for
        Detectron2's own norms, the name `norm` itself.

    Raises:
        InputError: raised by the function if the groups do not divide the channels.
    """
    if norm == POINTWISE:
        return partial(LayerNorm2d, eps=POINTWISE_EPSILON)
    if norm == RENORM:
        renorm = cfg.MODEL.BATCH_RENORM
        return partial(BatchRenorm2d, r_max=renorm.R_MAX, d_max=renorm.D_MAX)
    keys = cfg.MODEL.GROUP_NORM
    in_heads = part_of(layer_name) not in BACKBONE_PARTS
    if in_heads and keys.HEADS_DIM_PER_GP > 0:
        key, groups = "HEADS_DIM_PER_GP", {"dim_per_gp": keys.HEADS_DIM_PER_GP}
    elif in_heads and keys.HEADS_NUM_GROUPS > 0:
        key, groups = "HEADS_NUM_GROUPS", {"num_groups": keys.HEADS_NUM_GROUPS}
    else:
        key = "DIM_PER_GP" if keys.DIM_PER_GP > 0 else "NUM_GROUPS"
        groups = {"num_groups": keys.NUM_GROUPS, "dim_per_gp": keys.DIM_PER_GP}
    grouping = {"GN": groups, "LN": {"num_groups": 1}, "IN": {"dim_per_gp": 1}}.get(norm)
    if grouping is None:
        return norm

    def build(num_channels: int) -> nn.Module:
        try:
            return GroupNorm(num_channels, **grouping, eps=keys.EPSILON)
        except ValueError as error:
            full_key = f"MODEL.GROUP_NORM.{key}"
            raise InputError(
                f"{layer_name}: {error}", key=full_key, fix=f"change {full_key}"
            ) from None

    return build


def swap_norm(module: nn.Module, cfg: CfgNode, norm: str, module_name: str) -> None:
    """Replace every `BatchNorm2d` in `module`, in place, by the norm of gn_det with that name.

    Detectron2's builders take the norm as a name from the config, and its "GN" always has 32
    groups. So they build with "BN", and this function puts in the `GroupNorm` of the config.

    Args:
        module: a module that was built with `stock_config`.
        cfg: a config that `add_gn_config` was called on.
        norm: "GN", "LN", "IN", "LN2d" or "BRN", as in `get_norm`, or "WN" for weight normalization.
        module_name: name of `module` in the model, for error messages.

    Raises:
        InputError: if the groups do not divide the channels of a layer; it names the layer.
    """
    if norm == WEIGHT_NORM:
        normalize_weights(module)
        return
    for name, layer in module.named_modules():
        if isinstance(norm_layer := getattr(layer, "norm", None), nn.BatchNorm2d):
            build = get_norm(cfg, norm, f"{module_name}.{name}".removesuffix("."))
            layer.norm = build(norm_layer.num_features)  # type: ignore[operator]


def stock_config(cfg: CfgNode, *keys: str) -> CfgNode:
    """Return a copy of `cfg` for Detectron2's own builder, to be followed by `swap_norm`.

    For each of `keys`, such as "RESNETS", `MODEL.<key>.NORM` becomes "BN" if it `is_swapped`.
    `MODEL.BACKBONE.FREEZE_AT` becomes 0, because Detectron2's builder would turn the
    BatchNorm of frozen stages into FrozenBN, which `swap_norm` does not replace.
    """
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.BACKBONE.FREEZE_AT = 0
    for key in keys:
        if is_swapped(cfg.MODEL[key].NORM):
            stock.MODEL[key].NORM = "BN"
    return stock


def is_swapped(norm: str) -> bool:
    """Whether this value of a `NORM` key stands for a norm that `swap_norm` puts in."""
    return is_group_norm(norm) or norm in (POINTWISE, RENORM, WEIGHT_NORM)


def is_group_norm(norm: str) -> bool:
    """Whether this value of a `NORM` key stands for a `GroupNorm`: "GN", "LN" or "IN"."""
    return norm in ("GN", "LN", "IN")


def backbone_section(cfg: CfgNode) -> str:
    """The section of `MODEL` with the keys of the backbone: "VGG" or "RESNETS"."""
    return "VGG" if "vgg" in cfg.MODEL.BACKBONE.NAME else "RESNETS"


def backbone_norm(cfg: CfgNode) -> str:
    """The norm of the backbone, the value of `MODEL.RESNETS.NORM` or `MODEL.VGG.NORM`."""
    return cfg.MODEL[backbone_section(cfg)].NORM


def part_norm_keys(cfg: CfgNode) -> dict[str, str]:
    """`NORM_KEYS` for the backbone of a config."""
    return NORM_KEYS | {"backbone": f"MODEL.{backbone_section(cfg)}.NORM"}


def parts_with_norm(cfg: CfgNode) -> list[str]:
    """List the parts in `NORM_KEYS` that this config's model has.

    C4 models have neither an FPN nor convolutional heads; their RoI head is res5.
    """
    keys = cfg.MODEL
    heads = keys.ROI_HEADS.NAME in ("StandardROIHeads", "CascadeROIHeads")
    exists = {
        "backbone": True,
        "FPN": "fpn" in keys.BACKBONE.NAME,
        "box head": heads and keys.ROI_BOX_HEAD.NUM_CONV > 0,
        "mask head": heads and keys.MASK_ON and keys.ROI_MASK_HEAD.NUM_CONV > 0,
    }
    return [part for part in NORM_KEYS if exists[part]]
