"""Keys about norms that no layer would follow."""

from collections.abc import Iterator

from detectron2.config import CfgNode

from ..config import is_pretraining, value_of
from ..modeling.fused import IMPLEMENTATIONS, RECOMPUTE
from ..modeling.norm import NORM_KEYS, parts_with_norm
from .problem import Problem

# Detectron2's builders and heads that gn_det has its own of
STOCK = {
    "build_resnet_backbone": "build_gn_resnet_backbone",
    "build_resnet_fpn_backbone": "build_gn_resnet_fpn_backbone",
    "Res5ROIHeads": "GNRes5ROIHeads",
    "FastRCNNConvFCHead": "GNFastRCNNConvFCHead",
    "MaskRCNNConvUpsampleHead": "GNMaskRCNNConvUpsampleHead",
}


def check_norm_keys(cfg: CfgNode) -> Iterator[Problem]:
    """`NORM` keys of parts that have no layer for a norm."""
    keys = cfg.MODEL
    if keys.META_ARCHITECTURE != "GeneralizedRCNN":
        return
    with_norm = parts_with_norm(cfg)
    for part, reason in _without_layers(cfg).items():
        key = NORM_KEYS[part]
        if (norm := value_of(cfg, key)) and part not in with_norm:
            yield Problem(key, norm, f"it reaches no layer: {reason}", f'set {key} ""')
    if keys.RESNETS.ZERO_INIT_RESIDUAL and keys.RESNETS.NORM in ("", "FrozenBN"):
        why = f'MODEL.RESNETS.NORM "{keys.RESNETS.NORM}" has no gamma that could leave 0'
        yield Problem("MODEL.RESNETS.ZERO_INIT_RESIDUAL", True, why, "set it to False")


def _without_layers(cfg: CfgNode) -> dict[str, str]:
    """Why parts of Detectron2's and gn_det's own models have no layer for a norm."""
    keys, reasons = cfg.MODEL, {}
    if keys.BACKBONE.NAME in ("build_resnet_backbone", "build_gn_resnet_backbone"):
        reasons["FPN"] = f"{keys.BACKBONE.NAME} has no FPN"
    c4 = keys.ROI_HEADS.NAME in ("Res5ROIHeads", "GNRes5ROIHeads")
    for part, name in (("box head", "ROI_BOX_HEAD"), ("mask head", "ROI_MASK_HEAD")):
        if c4 and part == "box head":
            reasons[part] = "C4's box head is res5, whose norm is MODEL.RESNETS.NORM"
        elif keys[name].NUM_CONV == 0 and keys[name].NAME in {*STOCK, *STOCK.values()}:
            reasons[part] = f"MODEL.{name}.NUM_CONV is 0"
    if not keys.MASK_ON:
        reasons.pop("mask head", None)
    return reasons


def check_implementation(cfg: CfgNode) -> Iterator[Problem]:
    """How norms are to be computed."""
    keys = cfg.MODEL.GROUP_NORM
    for name, known in (("IMPL", IMPLEMENTATIONS), ("RECOMPUTE", RECOMPUTE)):
        if keys[name] not in known:
            mend = f"set it to one of {', '.join(known)}"
            yield Problem(f"MODEL.GROUP_NORM.{name}", keys[name], "it is none that there is", mend)
    if keys.IMPL == "native" and keys.RECOMPUTE in ("conv3", "block"):
        why = f'MODEL.GROUP_NORM.IMPL "{keys.IMPL}" keeps all that PyTorch keeps'
        mend = "set MODEL.GROUP_NORM.IMPL fused"
        yield Problem("MODEL.GROUP_NORM.RECOMPUTE", keys.RECOMPUTE, why, mend)


def check_builders(cfg: CfgNode) -> Iterator[Problem]:
    """Detectron2's own builders and heads, where keys are set that only gn_det's follow."""
    keys = cfg.MODEL
    resnet = [
        f"RESNETS.{key}"
        for key in ("ZERO_INIT_RESIDUAL", "WEIGHT_STANDARDIZATION")
        if keys.RESNETS[key]
    ]
    resnet_unlike, heads_unlike = _unlike_stock(keys.GROUP_NORM)
    unlike = {
        "BACKBONE": (keys.RESNETS.NORM == "GN" and resnet_unlike)
        or (keys.FPN.NORM == "GN" and heads_unlike),
        "ROI_HEADS": keys.RESNETS.NORM == "GN" and resnet_unlike,
        "ROI_BOX_HEAD": keys.ROI_BOX_HEAD.NORM == "GN" and heads_unlike,
        "ROI_MASK_HEAD": keys.ROI_MASK_HEAD.NORM == "GN" and heads_unlike,
    }
    # A classifier is a backbone and nothing else
    for part in ["BACKBONE"] if is_pretraining(cfg) else unlike:
        name = keys[part].NAME
        ignored = ["GROUP_NORM"] if unlike[part] else []
        ignored += resnet if part in ("BACKBONE", "ROI_HEADS") else []
        if name in STOCK and ignored:
            what = " and ".join(f"MODEL.{key}" for key in ignored)
            why = f"it is Detectron2's own and ignores {what}"
            yield Problem(f"MODEL.{part}.NAME", name, why, f"set it to {STOCK[name]}")


def _unlike_stock(keys: CfgNode) -> tuple[bool, bool]:
    """Whether GN of the ResNet, and of FPN and heads, is other than Detectron2's 32 groups."""
    epsilon = keys.EPSILON != 1e-5
    resnet = (keys.NUM_GROUPS, keys.DIM_PER_GP) != (32, -1)
    heads = keys.HEADS_NUM_GROUPS != 32 if keys.HEADS_NUM_GROUPS > 0 else resnet
    return epsilon or resnet, epsilon or heads
