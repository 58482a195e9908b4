"""Backbones, with and without FPN, in which every norm layer follows the `NORM` keys."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import (
    LastLevelMaxPool,
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from .fused import implement, implement_args
from .i3d import I3D, inflate
from .norm import is_swapped, stock_config, swap_norm
from .resnet import apply_resnet_keys
from .vgg import VGG


@BACKBONE_REGISTRY.register()
def build_gn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build Detectron2's ResNet with `MODEL.RESNETS.NORM` after every convolution.

    Args:
        cfg: a config that `add_gn_config` was called on. `MODEL.GROUP_NORM` sets the groups of
            "GN".
        input_shape: the number of channels of the input.

    Returns:
        the ResNet, frozen up to `MODEL.BACKBONE.FREEZE_AT`.

    Raises:
        InputError: if the groups do not divide the channels of a layer; it names the layer.
    """
    resnet = build_resnet_backbone(stock_config(cfg, "RESNETS"), input_shape)
    apply_resnet_keys(resnet, cfg, "backbone")
    resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    implement(resnet, **implement_args(cfg))
    return resnet


@BACKBONE_REGISTRY.register()
def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's ResNet-FPN, in which ResNet and FPN follow their own `NORM` keys.

    Args:
        cfg: a config that `add_gn_config` was called on. `MODEL.RESNETS.NORM` sets the norm of the
            ResNet, `MODEL.FPN.NORM` that of the FPN, and `MODEL.GROUP_NORM` the groups of "GN".
        input_shape: the number of channels of the input.

    Returns:
        the FPN, whose ResNet is frozen up to `MODEL.BACKBONE.FREEZE_AT`.

    Raises:
        InputError: if the groups do not divide the channels of a layer; it names the layer.
    """
    return _build_fpn(build_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_gn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build RetinaNet's ResNet-FPN, as `build_gn_resnet_fpn_backbone`, with p6 and p7 from res5.

    The convolutions of p6 and p7 have no norm, as in Detectron2.
    """
    return _build_fpn(build_retinanet_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_gn_i3d_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> I3D:
    """Build `build_gn_resnet_backbone` for clips, with the keys of `MODEL.I3D`."""
    return inflate(build_gn_resnet_backbone(cfg, input_shape), cfg.MODEL.I3D.STEM_STRIDES)


@BACKBONE_REGISTRY.register()
def build_gn_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG:
    """Build a VGG with `MODEL.VGG.NORM` after every convolution.

    Faster R-CNN uses its output "conv5", at stride 16.

    Args:
        cfg: a config that `add_gn_config` was called on.
        input_shape: not used; the input has three channels.

    Returns:
        the VGG, frozen up to `MODEL.BACKBONE.FREEZE_AT`.

    Raises:
        InputError: for an unknown depth or output, or if the groups do not divide the channels of a
            layer.
    """
    vgg = _build_vgg(cfg, "backbone")
    implement(vgg, **implement_args(cfg))
    return vgg


@BACKBONE_REGISTRY.register()
def build_gn_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an FPN on a VGG, as `build_gn_vgg_backbone`.

    With the outputs conv3, conv4, conv5 and pool5, its levels p2 to p6 have the strides of a
    ResNet's.
    """
    keys = stock_config(cfg, "FPN").MODEL.FPN
    fpn = FPN(
        bottom_up=_build_vgg(cfg, "backbone.bottom_up"),
        in_features=keys.IN_FEATURES,
        out_channels=keys.OUT_CHANNELS,
        norm=keys.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=keys.FUSE_TYPE,
    )
    return _finish_fpn(fpn, cfg)


def _build_vgg(cfg: CfgNode, module_name: str) -> VGG:
    keys = cfg.MODEL.VGG
    norm = "BN" if is_swapped(keys.NORM) else keys.NORM
    vgg = VGG(keys.DEPTH, keys.WIDTH, norm, keys.OUT_FEATURES)
    if is_swapped(keys.NORM):
        swap_norm(vgg, cfg, keys.NORM, module_name)
    return vgg.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


def _build_fpn(
    builder: Callable[[CfgNode, ShapeSpec], FPN], cfg: CfgNode, input_shape: ShapeSpec
) -> FPN:
    fpn = builder(stock_config(cfg, "RESNETS", "FPN"), input_shape)
    apply_resnet_keys(fpn.bottom_up, cfg, "backbone.bottom_up")
    fpn.bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    return _finish_fpn(fpn, cfg)


def _finish_fpn(fpn: FPN, cfg: CfgNode) -> FPN:
    """Apply `MODEL.FPN.NORM` to an FPN that was built with `stock_config`."""
    if is_swapped(cfg.MODEL.FPN.NORM):
        for name, conv in fpn.named_children():
            if conv is not fpn.bottom_up:
                swap_norm(conv, cfg, cfg.MODEL.FPN.NORM, f"backbone.{name}")
    implement(fpn, **implement_args(cfg))
    return fpn
