"""Detectors whose price is compared: Detectron2's, gn_det's, torchvision's."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch._dynamo
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from gn_det.config_file import read_config

STOCK = [
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
]
# Name: configs with BN* and GN, and the builders that make it stock
MODELS = {
    "R50-FPN": ("FPN_1x_4conv1fc", "FPN_1x_gn", ("build_resnet_fpn_backbone", "StandardROIHeads")),
    "R50-C4": ("C4_1x", "C4_1x_gn", ("build_resnet_backbone", "Res5ROIHeads")),
}
# Variants of one block class that PyTorch compiles; a ResNet has more than its default of 8
COMPILED_VARIANTS = 64
BASELINE, TORCHVISION = "Detectron2 BN*", "torchvision, GN in the backbone"
COMPILED = "GN through torch.compile"
OBJECTS = 20  # in each picture


def build_rivals(
    model: str,
    images: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    only: Sequence[str] = (),
) -> dict[str, "Detector"]:
    """The rivals by name, all with the same pictures.

    Args:
        model: one of `MODELS`.
        images: pictures in a batch, all of `size`, height and width.
        dtype: float32, or what autocast computes in.
        only: names beside the baseline; all by default.
    """
    batch = _pictures(images, *size, device)
    rivals = {
        name: Detector(_build(cfg), batch, dtype)
        for name, cfg in _configs(model, device).items()
        if not only or name in (BASELINE, *only)
    }
    if COMPILED in rivals:
        compile_blocks(rivals[COMPILED].model)
    if model == "R50-FPN" and (not only or TORCHVISION in only):
        theirs = _torchvision_detector(*size).to(device), _torchvision_batch(batch, device)
        rivals[TORCHVISION] = Detector(*theirs, dtype)
    return rivals


def _configs(model: str, device: str) -> dict[str, CfgNode]:
    bn, gn, (backbone, heads) = MODELS[model]
    stock = [*STOCK, "MODEL.BACKBONE.NAME", backbone, "MODEL.ROI_HEADS.NAME", heads]
    impl, recompute = "MODEL.GROUP_NORM.IMPL", "MODEL.GROUP_NORM.RECOMPUTE"
    rivals = {
        BASELINE: (bn, stock),
        "Detectron2 GN": (gn, stock),
        "gn_det BN*": (bn, []),
        **{f"gn_det GN, {level}": (gn, [recompute, level]) for level in ("none", "norm", "conv3")},
        "gn_det GN, block": (gn, [recompute, "block"]),
        "gn_det BN*, channels_last": (bn, ["MODEL.CHANNELS_LAST", "True"]),
        "gn_det GN, norm, channels_last": (gn, [recompute, "norm", "MODEL.CHANNELS_LAST", "True"]),
        COMPILED: (gn, [impl, "native"]),
    }
    few = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64", "MODEL.RPN.POST_NMS_TOPK_TEST", "100"]
    few = few if device == "cpu" else []
    common = [
        *("MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "MODEL.PIXEL_STD", "[57.0,57.0,57.0]"),
        # As many detections as there may be, whatever a network without training finds
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", *few),
    ]
    return {
        name: read_config(
            f"COCO-InstanceSegmentation/mask_rcnn_R_50_{config}.yaml", [*common, *opts]
        )
        for name, (config, opts) in rivals.items()
    }


def _build(cfg: CfgNode) -> nn.Module:
    """With random weights that let signals through, in whatever norm."""
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, module in model.named_modules():
        if name.endswith("conv3.norm"):
            # BN* without a pretraining's statistics would let 16 blocks add up
            nn.init.constant_(module.weight, 0.2)
    return model


def compile_blocks(module: nn.Module) -> None:
    """Compile every block, and every convolution with a norm outside of blocks, in place."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED_VARIANTS)
    for child in module.children():
        if isinstance(child, CNNBlockBase) or getattr(child, "norm", None) is not None:
            child.compile(dynamic=True)
        else:
            compile_blocks(child)


def _pictures(images: int, height: int, width: int, device: str) -> list[dict[str, Any]]:
    """Noise, with objects at random places."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corner = torch.rand(OBJECTS, 2, generator=generator) * 0.7
        side = 0.05 + torch.rand(OBJECTS, 2, generator=generator) * 0.25
        boxes = torch.cat([corner, corner + side], 1) * torch.tensor([width, height] * 2)
        x, y = torch.arange(width), torch.arange(height)[:, None]
        masks = [(x >= b[0]) & (x < b[2]) & (y >= b[1]) & (y < b[3]) for b in boxes]
        labels = torch.randint(80, (OBJECTS,), generator=generator)
        truth = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=labels)
        truth.gt_masks = BitMasks(torch.stack(masks))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        image, truth = image.to(device), truth.to(device)
        batch.append({"image": image, "instances": truth, "height": height, "width": width})
    return batch


class Detector:
    """A detector with its optimizer, on one batch."""

    def __init__(self, model: nn.Module, batch: Any, dtype: torch.dtype) -> None:
        self.model, self.batch = model, batch
        self.device = next(model.parameters()).device
        self.cast = partial(torch.autocast, self.device.type, dtype, enabled=dtype != torch.float32)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 1e-5, momentum=0.9)
        self.trained = trained

    def loss(self) -> Tensor:
        """The sum of all losses."""
        self.model.train()
        with EventStorage(), self.cast():
            inputs = self.batch if isinstance(self.batch, tuple) else (self.batch,)
            return sum(self.model(*inputs).values(), torch.zeros((), device=self.device))

    def resident_mib(self, way: str) -> float:
        """Between two steps: weights, and for training a gradient and a momentum of each."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [*self.trained, *self.trained] if way == "train" else []
        return sum(t.numel() * t.element_size() for t in tensors) / 2**20

    def train(self) -> None:
        """One step."""
        self.loss().backward()
        self.optimizer.step()
        # Kept in memory: what a step frees must not depend on its rivals
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def infer(self) -> None:
        """The pictures' detections, as one batch."""
        self.model.eval()
        with self.cast():
            self.model(self.batch[0] if isinstance(self.batch, tuple) else self.batch)


def _torchvision_detector(height: int, width: int) -> nn.Module:
    """Torchvision's Mask R-CNN with GN in its backbone, the one place where it takes a norm."""
    torch.manual_seed(0)
    norm = partial(nn.GroupNorm, 32)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=3
    )
    # Frozen as FREEZE_AT 2 does
    return MaskRCNN(backbone, 81, min_size=height, max_size=width, box_score_thresh=0.0)


def _torchvision_batch(
    batch: list[dict[str, Any]], device: str
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The same pictures, as torchvision takes them."""
    images = [(picture["image"].float() / 255).to(device) for picture in batch]
    targets = [
        {
            "boxes": picture["instances"].gt_boxes.tensor.to(device),
            "labels": picture["instances"].gt_classes.to(device) + 1,
            "masks": picture["instances"].gt_masks.tensor.to(device, torch.uint8),
        }
        for picture in batch
    ]
    return images, targets
