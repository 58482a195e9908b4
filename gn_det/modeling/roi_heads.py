"""RoI heads whose every norm layer follows the `NORM` keys."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
)
from torch import Tensor

from ..layers import recompute_activations
from .fused import implement, implementation
from .norm import get_norm, stock_config
from .resnet import finish_resnet


@ROI_HEADS_REGISTRY.register()
class GNRes5ROIHeads(Res5ROIHeads):
    """C4 heads whose res5 stage has the norm of the trunk, `MODEL.RESNETS.NORM` (Table 4)."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        heads = super().from_config(stock_config(cfg, "RESNETS"), input_shape)
        finish_resnet(heads["res5"], cfg, "roi_heads.res5")
        implement(heads["res5"], **implementation(cfg))
        return heads


class _Implemented:
    """A head whose convolutions compute their norms as `implement` says."""

    recompute = "none"

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, implementation: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(input_shape, **kwargs)  # type: ignore[call-arg]
        implement(self, **(implementation or {}))  # type: ignore[arg-type]


@ROI_BOX_HEAD_REGISTRY.register()
class GNFastRCNNConvFCHead(_Implemented, FastRCNNConvFCHead):
    """Box head with `MODEL.ROI_BOX_HEAD.NORM` after each conv; 4 convs and 1 fc make 4conv1fc."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = super().from_config(cfg, input_shape)
        where = "roi_heads.box_head.conv1 (MODEL.ROI_BOX_HEAD.CONV_DIM)"
        head["conv_norm"] = get_norm(cfg, cfg.MODEL.ROI_BOX_HEAD.NORM, where)
        head["implementation"] = implementation(cfg)
        return head

    def forward(self, x: Tensor) -> Tensor:
        with recompute_activations(self.recompute != "none"):
            return super().forward(x)


@ROI_MASK_HEAD_REGISTRY.register()
class GNMaskRCNNConvUpsampleHead(_Implemented, MaskRCNNConvUpsampleHead):
    """Mask head with `MODEL.ROI_MASK_HEAD.NORM` after each conv, not in deconv and predictor."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = super().from_config(cfg, input_shape)
        where = "roi_heads.mask_head.mask_fcn1 (MODEL.ROI_MASK_HEAD.CONV_DIM)"
        head["conv_norm"] = get_norm(cfg, cfg.MODEL.ROI_MASK_HEAD.NORM, where)
        head["implementation"] = implementation(cfg)
        return head

    def layers(self, x: Tensor) -> Tensor:
        with recompute_activations(self.recompute != "none"):
            return super().layers(x)
