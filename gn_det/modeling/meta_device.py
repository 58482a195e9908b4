"""A model to look at: every layer, name and shape, and no values."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn


def build_without_memory(cfg: CfgNode) -> nn.Module:
    """The model of `cfg` on PyTorch's meta device, where tensors take no memory and no time."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)
