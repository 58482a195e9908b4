"""An image classifier on a detector's backbone, for pretraining the backbone."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn

from ..config import is_clips
from .norm import backbone_section

# Height and width of VGG's last features at 224 pixels
VGG_SIDE = 7


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Backbone, global average pooling and one linear layer, for images of equal size.

    With `MODEL.VGG.FC_DIM`, VGG's two hidden layers with dropout take the place of the pooling.

    Args:
        cfg: a config whose backbone's last output feature is classified.
            `MODEL.ROI_HEADS.NUM_CLASSES` is the number of classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.feature, shape = [*self.backbone.output_shape().items()][-1]
        channels, units = shape.channels, cfg.MODEL.VGG.FC_DIM
        self.hidden = None
        if backbone_section(cfg) == "VGG" and units:
            self.hidden = _vgg_layers(channels, units)
            channels = units
        self.dropout = nn.Dropout(cfg.PRETRAIN.DROPOUT)
        self.classifier = nn.Linear(channels, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        nn.init.normal_(self.classifier.weight, std=0.01)
        for name, pixel in (("mean", cfg.MODEL.PIXEL_MEAN), ("std", cfg.MODEL.PIXEL_STD)):
            shape = (-1, 1, 1, 1) if is_clips(cfg) else (-1, 1, 1)
            self.register_buffer(name, torch.tensor(pixel).view(shape), persistent=False)

    def logits(self, images: Tensor) -> Tensor:
        """Compute the class scores of a batch of images or clips.

        Args:
            images: (N, 3, H, W) or (N, 3, T, H, W), values from 0 to 255, channels in the order of
                `INPUT.FORMAT`.

        Returns:
            logits, (N, classes).
        """
        x = self.backbone((images.to(self.mean.device) - self.mean) / self.std)[self.feature]
        x = x.mean(dim=tuple(range(2, x.dim()))) if self.hidden is None else self.hidden(x)
        return self.classifier(self.dropout(x))

    def forward(self, batch: Sequence[dict[str, Any]]) -> Any:
        """Compute the training loss of a batch, or the class scores of its images.

        Args:
            batch: one dict per image: "image", uint8, (3, H, W), or (3, T, H, W) for clips, of the
                same size for all; in training also "label", the class index. In evaluation, clips
                have the shape (clips, 3, T, H, W).

        Returns:
            {"loss_cls": scalar} in training, else one {"logits": (classes,)} per image. Of several
            clips, they are the logarithms of the average probabilities.
        """
        images = torch.stack([item["image"] for item in batch])
        if images.dim() == 6:
            logits = self.logits(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            logits = logits.softmax(2).mean(1).log()
        else:
            logits = self.logits(images)
        if not self.training:
            return [{"logits": scores} for scores in logits]
        labels = torch.tensor([item["label"] for item in batch], device=logits.device)
        return {"loss_cls": F.cross_entropy(logits, labels)}


def _vgg_layers(channels: int, units: int) -> nn.Sequential:
    """VGG's hidden layers fc6 and fc7."""
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(VGG_SIDE), nn.Flatten()]
    for width in (channels * VGG_SIDE**2, units):
        linear = nn.Linear(width, units)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers)
