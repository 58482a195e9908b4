"""Image classification with a detector's backbone, for pretraining it."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn


@META_ARCH_REGISTRY.register()
class CropClassifier(nn.Module):
    """Backbone, global average pooling and one linear layer, on crops of one size.

    Args:
        cfg: its backbone must have the output feature "res5".
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

    def logits(self, crops: Tensor) -> Tensor:
        """Class scores (N, classes) of uint8 crops (N, 3, H, W) in `INPUT.FORMAT`."""
        features = self.backbone((crops.to(self.mean.device) - self.mean) / self.std)["res5"]
        return self.classifier(features.mean(dim=(2, 3)))

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The training loss of (crops, labels)."""
        crops, labels = batch
        return {"loss_cls": F.cross_entropy(self.logits(crops), labels.to(self.mean.device))}
