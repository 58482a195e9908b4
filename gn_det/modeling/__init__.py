"""Models with Group Normalization. Importing this registers them in Detectron2's registries."""

from .backbone import (
    build_gn_i3d_resnet_backbone,
    build_gn_resnet_backbone,
    build_gn_resnet_fpn_backbone,
    build_gn_retinanet_resnet_fpn_backbone,
    build_gn_vgg_backbone,
    build_gn_vgg_fpn_backbone,
)
from .classifier import ImageClassifier
from .dense_heads import GNRetinaNet, GNSemSegFPNHead
from .fused import implement
from .meta_device import build_on_meta_device
from .roi_heads import GNFastRCNNConvFCHead, GNMaskRCNNConvUpsampleHead, GNRes5ROIHeads

__all__ = [
    "GNFastRCNNConvFCHead",
    "GNMaskRCNNConvUpsampleHead",
    "GNRes5ROIHeads",
    "GNRetinaNet",
    "GNSemSegFPNHead",
    "ImageClassifier",
    "build_gn_i3d_resnet_backbone",
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone",
    "build_gn_vgg_backbone",
    "build_gn_vgg_fpn_backbone",
    "build_on_meta_device",
    "implement",
]
