"""From Detectron2's `NORM` keys to the layers that they stand for."""

from collections.abc import Callable

from detectron2.config import CfgNode
from torch import nn

from ..errors import InputError
from ..layers import GroupNorm
from .parts import TRUNK, part_of

Norm = str | Callable[[int], nn.Module]
# The key that sets the norm of each part
NORM_KEYS = {
    "backbone": "MODEL.RESNETS.NORM",
    "FPN": "MODEL.FPN.NORM",
    "box head": "MODEL.ROI_BOX_HEAD.NORM",
    "mask head": "MODEL.ROI_MASK_HEAD.NORM",
}


def get_norm(cfg: CfgNode, norm: str, where: str) -> Norm:
    """What to hand to a Detectron2 module as its `norm` argument.

    Args:
        cfg: a config that `add_gn_config` has been called on.
        norm: value of a `NORM` key. "GN", "LN" and "IN" follow the paper's Figure 2: G groups, one
            group, one channel per group. Every other name ("", "FrozenBN", "BN", "SyncBN", ...) is
            Detectron2's own and comes back as it is.
        where: name in the model of the layer that gets the norm: `HEADS_NUM_GROUPS` holds outside
            the ResNet. Error messages begin with it.

    Returns:
        `norm` itself, or a function from the number of channels to a `GroupNorm`.

    Raises:
        InputError: by the function, for channels that the groups do not divide.
    """
    keys = cfg.MODEL.GROUP_NORM
    if keys.HEADS_NUM_GROUPS > 0 and part_of(where) not in TRUNK:
        key, groups = "HEADS_NUM_GROUPS", {"num_groups": keys.HEADS_NUM_GROUPS}
    else:
        key = "DIM_PER_GP" if keys.DIM_PER_GP > 0 else "NUM_GROUPS"
        groups = {"num_groups": keys.NUM_GROUPS, "dim_per_gp": keys.DIM_PER_GP}
    division = {"GN": groups, "LN": {"num_groups": 1}, "IN": {"dim_per_gp": 1}}.get(norm)
    if division is None:
        return norm

    def build(num_channels: int) -> nn.Module:
        try:
            return GroupNorm(num_channels, **division, eps=keys.EPSILON)
        except ValueError as error:
            raise InputError(f"{where}: {error}; change MODEL.GROUP_NORM.{key}") from None

    return build


def swap_norm(module: nn.Module, cfg: CfgNode, norm: str, where: str) -> None:
    """Put the norm that `cfg` asks for in the place of every `BatchNorm2d` below `module`.

    Detectron2's builders take their norm by name from the config, where no `GroupNorm` of another
    division can be named. So they build with "BN", and this puts the wanted layer in its place.

    Raises:
        InputError: for a layer whose channels do not divide; it names the layer.
    """
    for name, layer in module.named_modules():
        if isinstance(norm_layer := getattr(layer, "norm", None), nn.BatchNorm2d):
            build = get_norm(cfg, norm, f"{where}.{name}".removesuffix("."))
            layer.norm = build(norm_layer.num_features)  # type: ignore[operator]


def stock_config(cfg: CfgNode, *keys: str) -> CfgNode:
    """A copy of `cfg` for Detectron2's own builder, before `swap_norm` and freezing.

    `MODEL.<key>.NORM` is "BN" where it was "GN", "LN" or "IN". Nothing is frozen, since Detectron2
    freezes while it builds and turns BatchNorm into FrozenBN, which could not be swapped any more.
    """
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.BACKBONE.FREEZE_AT = 0
    for key in keys:
        if is_group_norm(cfg.MODEL[key].NORM):
            stock.MODEL[key].NORM = "BN"
    return stock


def is_group_norm(norm: str) -> bool:
    """Whether layers of this `NORM` value are `GroupNorm`s."""
    return norm in ("GN", "LN", "IN")


def parts_with_norm(cfg: CfgNode) -> list[str]:
    """The keys of `NORM_KEYS` that stand for layers of this config's model.

    C4 models have neither an FPN nor convolutional heads: res5 is their box head.
    """
    keys = cfg.MODEL
    heads = keys.ROI_HEADS.NAME in ("StandardROIHeads", "CascadeROIHeads")
    found = {
        "backbone": True,
        "FPN": "fpn" in keys.BACKBONE.NAME,
        "box head": heads and keys.ROI_BOX_HEAD.NUM_CONV > 0,
        "mask head": heads and keys.MASK_ON and keys.ROI_MASK_HEAD.NUM_CONV > 0,
    }
    return [part for part, has_layers in found.items() if has_layers]
