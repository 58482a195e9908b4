"""A detector as a function of tensors, which can be traced and exported."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor, nn

# Above every probability
DUMMY_SCORE = 2.0


class _NeverEmptyOutputLayers(FastRCNNOutputLayers):
    """Box predictor whose first detection is a dummy: an empty box with `DUMMY_SCORE`.

    So there is a detection in every image. Without one, ONNX Runtime fails in the norms of the mask
    head, and OpenVINO returns a detection that does not exist.
    """

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        (boxes,) = self.predict_boxes(predictions, proposals)
        (scores,) = self.predict_probs(predictions, proposals)
        dummy = torch.cat([scores.new_full((1, 1), DUMMY_SCORE), scores[:1, 1:] * 0], dim=1)
        return fast_rcnn_inference(
            [torch.cat([boxes[:1] * 0, boxes])],
            [torch.cat([dummy, scores])],
            [proposals[0].image_size],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image + 1,
        )


def exportable(model: Any, image: Tensor) -> nn.Module:
    """Wrap a detector as a module from a tensor to tensors, which can be traced.

    Args:
        model: a `GeneralizedRCNN` with boxes, and maybe masks, in eval mode; changed in place.
        image: an input of it, (3, H, W).

    Returns:
        a module that takes such an image, of any height and width, and returns the tensors that
        `output_names` lists: boxes, (N, 4), XYXY in pixels of the input; classes, (N,); masks,
        (N, 1, M, M), probabilities within each box; scores, (N,), in decreasing order.

    Raises:
        ImportError: if Detectron2's package `export` cannot be imported, as that of 0.6.
    """
    from detectron2.export import TracingAdapter

    predictor = getattr(model.roi_heads, "box_predictor", None)
    never_empty = type(predictor) is FastRCNNOutputLayers
    if never_empty:
        predictor.__class__ = _NeverEmptyOutputLayers  # type: ignore[union-attr]

    def detect(model: Any, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        found = model.inference(inputs, do_postprocess=False)[0].get_fields()
        tensors = {
            "boxes": found["pred_boxes"].tensor,
            "classes": found["pred_classes"],
            "scores": found["scores"],
        }
        if "pred_masks" in found:
            tensors["masks"] = found["pred_masks"]
        return {name: t[1:] if never_empty else t for name, t in tensors.items()}

    # An adapter in training mode would put the model into it as well
    return TracingAdapter(model, [{"image": image}], detect).eval()


def output_names(cfg: CfgNode) -> list[str]:
    """The names of the tensors that `exportable` returns, in their order."""
    return ["boxes", "classes", *(["masks"] if cfg.MODEL.MASK_ON else []), "scores"]
