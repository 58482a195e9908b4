"""Detector implementations for the benchmark: Detectron2's, gn_det's and torchvision's."""

from collections.abc import Collection
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
# Name: configs with BN* and GN, and the names of backbone and RoI heads of stock Detectron2
MODELS = {
    "R50-FPN": ("FPN_1x_4conv1fc", "FPN_1x_gn", ("build_resnet_fpn_backbone", "StandardROIHeads")),
    "R50-C4": ("C4_1x", "C4_1x_gn", ("build_resnet_backbone", "Res5ROIHeads")),
}
# Limit of compiled variants per block class; a ResNet needs more than PyTorch's default of 8
COMPILED_VARIANTS = 64
BASELINE, TORCHVISION = "Detectron2 BN*", "torchvision, GN in the backbone"
COMPILED = "GN through torch.compile"
OBJECTS = 20  # per image
# Any overlap makes a RoI foreground, so that every mask head gets the same number of RoIs: with
# random weights, few proposals overlap an object well, and how many depends on the norm
FOREGROUND_IOU = 1e-4


def rival_names(model: str) -> list[str]:
    """Names of all implementations of a detector, one of `MODELS`; the baseline is first."""
    return [*_configs(model, "cpu"), *([TORCHVISION] if model == "R50-FPN" else [])]


def build_rivals(
    model: str,
    images: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    names: Collection[str],
) -> dict[str, "Detector"]:
    """Build implementations of a detector, each with the same batch.

    Args:
        model: one of `MODELS`.
        images: images per batch.
        size: height and width of the images.
        dtype: float32, or the dtype of autocast.
        device: "cpu" or "cuda".
        names: some of `rival_names`.

    Returns:
        detectors by name.
    """
    batch = _random_batch(images, *size, device)
    configs = {name: cfg for name, cfg in _configs(model, device).items() if name in names}
    rivals = {name: Detector(_build(cfg), batch, dtype) for name, cfg in configs.items()}
    if COMPILED in rivals:
        compile_blocks(rivals[COMPILED].model)
    if TORCHVISION in names and model == "R50-FPN":
        theirs = _torchvision_detector(*size).to(device), _torchvision_batch(batch, device)
        rivals[TORCHVISION] = Detector(*theirs, dtype)
    return rivals


def _configs(model: str, device: str) -> dict[str, CfgNode]:
    bn, gn, (backbone, heads) = MODELS[model]
    stock = [*STOCK, "MODEL.BACKBONE.NAME", backbone, "MODEL.ROI_HEADS.NAME", heads]
    impl, recompute = "MODEL.GROUP_NORM.IMPL", "MODEL.GROUP_NORM.RECOMPUTE"
    rivals = {
        BASELINE: (bn, stock),
        # GN's configs have the stride in the 3x3 convolutions, as the paper's, which costs more
        f"{BASELINE}, GN's stride": (bn, [*stock, "MODEL.RESNETS.STRIDE_IN_1X1", "False"]),
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
        # Always the maximum number of detections, although the network is untrained
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", *few),
        *("MODEL.ROI_HEADS.IOU_THRESHOLDS", f"[{FOREGROUND_IOU}]"),
    ]
    return {
        name: read_config(
            f"COCO-InstanceSegmentation/mask_rcnn_R_50_{config}.yaml", [*common, *opts]
        )
        for name, (config, opts) in rivals.items()
    }


def _build(cfg: CfgNode) -> nn.Module:
    """Build a model with random weights whose activations stay finite with any norm."""
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, module in model.named_modules():
        if name.endswith("conv3.norm"):
            # Without pretrained statistics BN* does not normalize: the 16 blocks would add up
            nn.init.constant_(module.weight, 0.2)
    return model


def compile_blocks(module: nn.Module) -> None:
    """Compile every block, and every convolution with a norm outside blocks, in place."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED_VARIANTS)
    for child in module.children():
        if isinstance(child, CNNBlockBase) or getattr(child, "norm", None) is not None:
            child.compile(dynamic=True)
        else:
            compile_blocks(child)


def _random_batch(images: int, height: int, width: int, device: str) -> list[dict[str, Any]]:
    """A batch of noise images in Detectron2's format, with objects at random locations."""
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
    """A detector with its optimizer and one batch.

    Args:
        model: takes `batch`, or its elements if it is a tuple.
        batch: inputs for training; a tuple (images, targets) for torchvision.
        dtype: float32, or the dtype of autocast.
    """

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
        """Memory held between steps in MiB: weights, and for training the momentum.

        Args:
            way: "train" or "infer".
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += self.trained if way == "train" else []
        return sum(t.numel() * t.element_size() for t in tensors) / 2**20

    def train(self) -> None:
        """One training step, as Detectron2's trainer takes it."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> None:
        """Inference on the batch."""
        self.model.eval()
        with self.cast():
            self.model(self.batch[0] if isinstance(self.batch, tuple) else self.batch)


def _torchvision_detector(height: int, width: int) -> nn.Module:
    """Torchvision's Mask R-CNN with GN in the backbone, the only part with a configurable norm."""
    torch.manual_seed(0)
    norm = partial(nn.GroupNorm, 32)
    # trainable_layers=3 freezes the same stages as FREEZE_AT 2
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=3
    )
    overlap = {"box_fg_iou_thresh": FOREGROUND_IOU, "box_bg_iou_thresh": FOREGROUND_IOU}
    size = {"min_size": height, "max_size": width}
    return MaskRCNN(backbone, 81, **size, box_score_thresh=0.0, **overlap)


def _torchvision_batch(
    batch: list[dict[str, Any]], device: str
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The same batch in torchvision's format: images and targets."""
    images = [(entry["image"].float() / 255).to(device) for entry in batch]
    targets = [
        {
            "boxes": entry["instances"].gt_boxes.tensor.to(device),
            "labels": entry["instances"].gt_classes.to(device) + 1,
            "masks": entry["instances"].gt_masks.tensor.to(device, torch.uint8),
        }
        for entry in batch
    ]
    return images, targets
