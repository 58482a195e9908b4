"""Models on PyTorch's meta device, to inspect layers, names and shapes without any values."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn


def build_on_meta_device(cfg: CfgNode) -> nn.Module:
    """Build the model of `cfg` on the meta device, where tensors take neither memory nor time."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)
