"""Checks of keys for norm layers that would have no effect."""

from collections.abc import Iterator

from detectron2.config import CfgNode

from ..config import is_pretraining, value_of
from ..modeling.fused import IMPLEMENTATIONS, RECOMPUTE
from ..modeling.norm import WEIGHT_NORM, backbone_section, part_norm_keys, parts_with_norm
from .problem import Problem

# Detectron2's builders and heads -> gn_det's versions of them
STOCK = {
    "build_resnet_backbone": "build_gn_resnet_backbone",
    "build_resnet_fpn_backbone": "build_gn_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_gn_retinanet_resnet_fpn_backbone",
    "Res5ROIHeads": "GNRes5ROIHeads",
    "FastRCNNConvFCHead": "GNFastRCNNConvFCHead",
    "MaskRCNNConvUpsampleHead": "GNMaskRCNNConvUpsampleHead",
    "SemSegFPNHead": "GNSemSegFPNHead",
    "RetinaNet": "GNRetinaNet",
}
NO_FPN = ("build_resnet_backbone", "build_gn_resnet_backbone", "build_gn_vgg_backbone")
RCNN = ("BACKBONE", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
# Architecture -> sections of its parts; others, such as a classifier, have only a known backbone
SECTIONS = {
    "GeneralizedRCNN": RCNN,
    "PanopticFPN": (*RCNN, "SEM_SEG_HEAD"),
    "SemanticSegmentor": ("BACKBONE", "SEM_SEG_HEAD"),
    "RetinaNet": ("BACKBONE", "RETINANET"),
}


def check_norm_keys(cfg: CfgNode) -> Iterator[Problem]:
    """Check for `NORM` keys of model parts that have no layer with a norm."""
    keys = cfg.MODEL
    for key in part_norm_keys(cfg).values():
        if value_of(cfg, key) == WEIGHT_NORM and not is_pretraining(cfg):
            reason, fix = "weight normalization is for pretraining", "set it to GN or FrozenBN"
            yield Problem(key, WEIGHT_NORM, reason, fix)
    if keys.META_ARCHITECTURE != "GeneralizedRCNN":
        return
    with_norm = parts_with_norm(cfg)
    for part, (cause, fix) in _without_layers(cfg).items():
        key = part_norm_keys(cfg)[part]
        if (norm := value_of(cfg, key)) and part not in with_norm:
            yield Problem(key, norm, f"it has no effect, since {cause}", f'set {key} ""{fix}')
    resnet = backbone_section(cfg) == "RESNETS"
    if resnet and keys.RESNETS.ZERO_INIT_RESIDUAL and keys.RESNETS.NORM in ("", "FrozenBN"):
        reason = f'MODEL.RESNETS.NORM "{keys.RESNETS.NORM}" has no trainable gamma'
        yield Problem("MODEL.RESNETS.ZERO_INIT_RESIDUAL", True, reason, "set it to False")


def _without_layers(cfg: CfgNode) -> dict[str, tuple[str, str]]:
    """Parts of the model without a norm layer, each with the cause and another possible fix.

    Only Detectron2's and gn_det's own backbones and heads are known.
    """
    keys, causes = cfg.MODEL, {}
    if keys.BACKBONE.NAME in NO_FPN:
        causes["FPN"] = f"{keys.BACKBONE.NAME} has no FPN", ""
    c4 = keys.ROI_HEADS.NAME in ("Res5ROIHeads", "GNRes5ROIHeads")
    for part, name in (("box head", "ROI_BOX_HEAD"), ("mask head", "ROI_MASK_HEAD")):
        if c4 and part == "box head":
            causes[part] = "C4's box head is res5, whose norm is MODEL.RESNETS.NORM", ""
        elif keys[name].NUM_CONV == 0 and keys[name].NAME in {*STOCK, *STOCK.values()}:
            causes[part] = f"MODEL.{name}.NUM_CONV is 0", f", or MODEL.{name}.NUM_CONV 4"
    if not keys.MASK_ON:
        causes.pop("mask head", None)
    return causes


def check_implementation(cfg: CfgNode) -> Iterator[Problem]:
    """Check `MODEL.GROUP_NORM.IMPL` and `MODEL.GROUP_NORM.RECOMPUTE`."""
    keys = cfg.MODEL.GROUP_NORM
    for name, known in (("IMPL", IMPLEMENTATIONS), ("RECOMPUTE", RECOMPUTE)):
        if keys[name] not in known:
            fix = f"set it to one of {', '.join(known)}"
            yield Problem(f"MODEL.GROUP_NORM.{name}", keys[name], "it is not supported", fix)
    if keys.IMPL == "native" and keys.RECOMPUTE in ("conv3", "block"):
        reason = 'MODEL.GROUP_NORM.IMPL "native" does not support recomputation'
        fix = "set MODEL.GROUP_NORM.IMPL fused"
        yield Problem("MODEL.GROUP_NORM.RECOMPUTE", keys.RECOMPUTE, reason, fix)


def check_builders(cfg: CfgNode) -> Iterator[Problem]:
    """Check that Detectron2's own builders and heads are not given keys that they ignore."""
    keys = cfg.MODEL
    resnet = [
        f"RESNETS.{key}"
        for key in ("ZERO_INIT_RESIDUAL", "WEIGHT_STANDARDIZATION")
        if keys.RESNETS[key]
    ]
    resnet_differs, heads_differ = _differs_from_stock(keys.GROUP_NORM)
    differs = {
        "BACKBONE": (keys.RESNETS.NORM == "GN" and resnet_differs)
        or (keys.FPN.NORM == "GN" and heads_differ),
        "ROI_HEADS": keys.RESNETS.NORM == "GN" and resnet_differs,
        **{
            part: keys[part].NORM == "GN" and heads_differ
            for part in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET")
        },
    }
    for part in SECTIONS.get(keys.META_ARCHITECTURE, ("BACKBONE",)):
        key = "META_ARCHITECTURE" if part == "RETINANET" else f"{part}.NAME"
        name = value_of(cfg, f"MODEL.{key}")
        ignored = ["GROUP_NORM"] if differs[part] else []
        ignored += resnet if part in ("BACKBONE", "ROI_HEADS") else []
        if name in STOCK and ignored:
            names = " and ".join(f"MODEL.{key}" for key in ignored)
            reason = f"this part of Detectron2 ignores {names}"
            yield Problem(f"MODEL.{key}", name, reason, f"set it to {STOCK[name]}")


def _differs_from_stock(keys: CfgNode) -> tuple[bool, bool]:
    """Whether GN differs from Detectron2's 32 groups: in the ResNet, and in FPN and heads."""
    epsilon = keys.EPSILON != 1e-5
    resnet = (keys.NUM_GROUPS, keys.DIM_PER_GP) != (32, -1)
    heads = keys.HEADS_NUM_GROUPS != 32 if keys.HEADS_NUM_GROUPS > 0 else resnet
    heads = heads or keys.HEADS_DIM_PER_GP > 0
    return epsilon or resnet, epsilon or heads
