"""A detector as a function of tensors, which can be traced and exported."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import shapes_to_tensor
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

# Above every probability
DUMMY_SCORE = 2.0


class _PlainlyPaddedRCNN(GeneralizedRCNN):
    """Detector that pads an image by arithmetic on its size, which OpenVINO computes rightly."""

    def preprocess_image(self, batched_inputs: list[dict[str, Tensor]]) -> ImageList:
        (inputs,) = batched_inputs
        image = (inputs["image"].to(self.device) - self.pixel_mean) / self.pixel_std
        height, width = image.shape[-2:]
        stride = max(self.backbone.size_divisibility, 1)
        padding = (0, (stride - width % stride) % stride, 0, (stride - height % stride) % stride)
        return ImageList(F.pad(image[None], padding), [shapes_to_tensor([height, width])])


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

    if type(model) is GeneralizedRCNN:
        model.__class__ = _PlainlyPaddedRCNN
    predictor = getattr(model.roi_heads, "box_predictor", None)
    never_empty = type(predictor) is FastRCNNOutputLayers
    if never_empty:
        predictor.__class__ = _NeverEmptyOutputLayers

    def detect(model: Any, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tensors = tensors_of(model.inference(inputs, do_postprocess=False)[0])
        return {name: t[1:] if never_empty else t for name, t in tensors.items()}

    # An adapter in training mode would put the model into it as well
    return TracingAdapter(model, [{"image": image}], detect).eval()


def tensors_of(instances: Instances) -> dict[str, Tensor]:
    """The tensors of detections, by the names in `output_names`."""
    fields = instances.get_fields()
    masks = {"masks": fields["pred_masks"]} if "pred_masks" in fields else {}
    boxes, classes = fields["pred_boxes"].tensor, fields["pred_classes"]
    return {"boxes": boxes, "classes": classes, **masks, "scores": fields["scores"]}


def output_names(cfg: CfgNode) -> list[str]:
    """The names of the tensors that `exportable` returns, in their order."""
    return ["boxes", "classes", *(["masks"] if cfg.MODEL.MASK_ON else []), "scores"]
