"""Image classification with a detector's backbone, for pretraining it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Backbone, global average pooling and one linear layer, on pictures of one size.

    Args:
        cfg: its backbone must have the output feature "res5"; `MODEL.ROI_HEADS.NUM_CLASSES` is the
            number of classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        channels = self.backbone.output_shape()["res5"].channels
        self.classifier = nn.Linear(channels, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        nn.init.normal_(self.classifier.weight, std=0.01)
        for name, pixel in (("mean", cfg.MODEL.PIXEL_MEAN), ("std", cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(pixel).view(-1, 1, 1), persistent=False)

    def logits(self, pictures: Tensor) -> Tensor:
        """Class scores (N, classes) of pictures (N, 3, H, W), 0 to 255, in `INPUT.FORMAT`."""
        features = self.backbone((pictures.to(self.mean.device) - self.mean) / self.std)["res5"]
        return self.classifier(features.mean(dim=(2, 3)))

    def forward(self, batch: Sequence[dict[str, Any]]) -> Any:
        """The training loss of a batch, or the scores of its pictures.

        Args:
            batch: for each picture, "image" (3, H, W), uint8, all of one size, and in training its
                class index "label".

        Returns:
            {"loss_cls": scalar} in training, else for each picture {"logits": (classes,)}.
        """
        logits = self.logits(torch.stack([picture["image"] for picture in batch]))
        if not self.training:
            return [{"logits": scores} for scores in logits]
        labels = torch.tensor([picture["label"] for picture in batch], device=logits.device)
        return {"loss_cls": F.cross_entropy(logits, labels)}
