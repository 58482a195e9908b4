"""Heads on whole feature maps, of RetinaNet and semantic segmentation, that follow `NORM` keys."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import nn

from .fused import implement, implement_args
from .norm import get_norm, is_swapped, stock_config


@SEM_SEG_HEADS_REGISTRY.register()
class GNSemSegFPNHead(SemSegFPNHead):
    """Head of semantic and panoptic segmentation, with `MODEL.SEM_SEG_HEAD.NORM`."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = super().from_config(cfg, input_shape)
        name = "sem_seg_head.p2 (MODEL.SEM_SEG_HEAD.CONVS_DIM)"
        head["norm"] = get_norm(cfg, cfg.MODEL.SEM_SEG_HEAD.NORM, name)
        return head


class GNRetinaNetHead(RetinaNetHead):
    """RetinaNet's head with `MODEL.RETINANET.NORM`, whose parameters all levels share."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        head = super().from_config(cfg, input_shape)
        name = "head.cls_subnet (MODEL.FPN.OUT_CHANNELS)"
        norm, width = get_norm(cfg, cfg.MODEL.RETINANET.NORM, name), input_shape[0].channels

        def build(channels: int) -> nn.Module:
            # Detectron2 also builds a norm of another width, to log its type
            return norm(channels) if channels == width else nn.Identity()  # type: ignore[operator]

        head["norm"] = norm if isinstance(norm, str) else build
        return head


@META_ARCH_REGISTRY.register()
class GNRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with a `GNRetinaNetHead`."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        parts = super().from_config(stock_config(cfg, "RETINANET"))
        if is_swapped(cfg.MODEL.RETINANET.NORM):
            shapes = parts["backbone"].output_shape()
            features = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
            parts["head"] = implement(GNRetinaNetHead(cfg, features), **implement_args(cfg))
        return parts
