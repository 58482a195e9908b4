"""RoI heads in which every norm layer follows the `NORM` keys."""

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
from torch import Tensor, nn

from ..layers import recompute_activations
from .fused import implement, implement_args
from .norm import get_norm, stock_config
from .resnet import apply_resnet_keys


@ROI_HEADS_REGISTRY.register()
class GNRes5ROIHeads(Res5ROIHeads):
    """C4 RoI heads whose res5 stage has the backbone's norm, `MODEL.RESNETS.NORM` (Table 4)."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        heads = super().from_config(stock_config(cfg, "RESNETS"), input_shape)
        apply_resnet_keys(heads["res5"], cfg, "roi_heads.res5")
        implement(heads["res5"], **implement_args(cfg))
        return heads


class _ImplementedHead:
    """Mixin that passes a head to `implement` once it is built.

    Args:
        input_shape, kwargs: as for the head.
        implementation: the arguments of `implement`, or None for its defaults.

    Attributes:
        recompute: whether norms are recomputed, set by `implement`; "none" means they are not.
        recomputing: the subclass that such a head becomes. Others keep Detectron2's `forward`,
            which torch.jit.script can compile.
    """

    recompute = "none"
    recomputing: type[nn.Module]

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, implementation: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(input_shape, **kwargs)  # type: ignore[call-arg]
        implement(self, **(implementation or {}))  # type: ignore[arg-type]
        if self.recompute != "none":
            self.__class__ = self.recomputing  # type: ignore[assignment]


@ROI_BOX_HEAD_REGISTRY.register()
class GNFastRCNNConvFCHead(_ImplementedHead, FastRCNNConvFCHead):
    """Box head with `MODEL.ROI_BOX_HEAD.NORM` after each convolution.

    It is the paper's 4conv1fc head with `NUM_CONV` 4 and `NUM_FC` 1.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = super().from_config(cfg, input_shape)
        name = "roi_heads.box_head.conv1 (MODEL.ROI_BOX_HEAD.CONV_DIM)"
        head["conv_norm"] = get_norm(cfg, cfg.MODEL.ROI_BOX_HEAD.NORM, name)
        head["implementation"] = implement_args(cfg)
        return head


class _RecomputingBoxHead(GNFastRCNNConvFCHead):
    def forward(self, x: Tensor) -> Tensor:
        with recompute_activations():
            return super().forward(x)


GNFastRCNNConvFCHead.recomputing = _RecomputingBoxHead


@ROI_MASK_HEAD_REGISTRY.register()
class GNMaskRCNNConvUpsampleHead(_ImplementedHead, MaskRCNNConvUpsampleHead):
    """Mask head with `MODEL.ROI_MASK_HEAD.NORM` after each convolution.

    The deconvolution and the predictor have no norm.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = super().from_config(cfg, input_shape)
        name = "roi_heads.mask_head.mask_fcn1 (MODEL.ROI_MASK_HEAD.CONV_DIM)"
        head["conv_norm"] = get_norm(cfg, cfg.MODEL.ROI_MASK_HEAD.NORM, name)
        head["implementation"] = implement_args(cfg)
        return head


class _RecomputingMaskHead(GNMaskRCNNConvUpsampleHead):
    def layers(self, x: Tensor) -> Tensor:
        with recompute_activations():
            return super().layers(x)


GNMaskRCNNConvUpsampleHead.recomputing = _RecomputingMaskHead
