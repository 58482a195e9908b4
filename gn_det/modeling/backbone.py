"""ResNet and ResNet-FPN backbones whose every norm layer follows the `NORM` keys."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from .fused import implement, implementation
from .norm import is_group_norm, stock_config, swap_norm
from .resnet import finish_resnet


@BACKBONE_REGISTRY.register()
def build_gn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet with `MODEL.RESNETS.NORM` in every conv, "GN" by `MODEL.GROUP_NORM`.

    Raises:
        InputError: if the groups do not divide the channels of a layer; it names the layer.
    """
    resnet = build_resnet_backbone(stock_config(cfg, "RESNETS"), input_shape)
    finish_resnet(resnet, cfg, "backbone")
    resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    implement(resnet, **implementation(cfg))
    return resnet


@BACKBONE_REGISTRY.register()
def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN: `MODEL.RESNETS.NORM` in the ResNet, `MODEL.FPN.NORM` in the FPN.

    Raises:
        InputError: if the groups do not divide the channels of a layer; it names the layer.
    """
    fpn = build_resnet_fpn_backbone(stock_config(cfg, "RESNETS", "FPN"), input_shape)
    finish_resnet(fpn.bottom_up, cfg, "backbone.bottom_up")
    fpn.bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    if is_group_norm(cfg.MODEL.FPN.NORM):
        for name, conv in fpn.named_children():
            if conv is not fpn.bottom_up:
                swap_norm(conv, cfg, cfg.MODEL.FPN.NORM, f"backbone.{name}")
    implement(fpn, **implementation(cfg))
    return fpn
