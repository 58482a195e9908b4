"""Importing this registers the backbones and heads in Detectron2's registries."""

from .backbone import build_gn_resnet_backbone, build_gn_resnet_fpn_backbone
from .roi_heads import GNFastRCNNConvFCHead, GNMaskRCNNConvUpsampleHead, GNRes5ROIHeads

__all__ = [
    "GNFastRCNNConvFCHead",
    "GNMaskRCNNConvUpsampleHead",
    "GNRes5ROIHeads",
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
]
