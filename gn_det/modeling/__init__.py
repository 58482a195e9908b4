"""Importing this registers the backbones and heads in Detectron2's registries."""

from .backbone import build_gn_resnet_backbone, build_gn_resnet_fpn_backbone
from .classifier import CropClassifier
from .meta_device import build_without_memory
from .roi_heads import GNFastRCNNConvFCHead, GNMaskRCNNConvUpsampleHead, GNRes5ROIHeads

__all__ = [
    "CropClassifier",
    "GNFastRCNNConvFCHead",
    "GNMaskRCNNConvUpsampleHead",
    "GNRes5ROIHeads",
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
    "build_without_memory",
]
