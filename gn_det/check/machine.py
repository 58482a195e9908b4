"""Checks of the device, the weights file and the output folder."""

import os
from pathlib import Path

import torch
from detectron2.config import CfgNode

from ..errors import InputError


def check_machine(cfg: CfgNode) -> None:
    """Raise an `InputError` for a device, weights file or output folder that cannot be used."""
    check_device(cfg)
    check_weights_file(cfg)
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made: {error.strerror}") from None
    if not os.access(cfg.OUTPUT_DIR, os.W_OK):
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written to")


def check_device(cfg: CfgNode) -> None:
    """Raise an `InputError` for a GPU that is not there."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("MODEL.DEVICE is cuda, but PyTorch sees no GPU: add MODEL.DEVICE cpu")


def check_weights_file(cfg: CfgNode) -> None:
    """Raise an `InputError` for a weights file that does not exist."""
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]
    if weights and "://" not in weights and not os.path.isfile(weights):
        what = "is a folder" if os.path.isdir(weights) else "does not exist"
        raise InputError(
            f"MODEL.WEIGHTS {weights} {what}: give the file of a backbone or a detector, "
            'or "" with MODEL.BACKBONE.FREEZE_AT 0 to train from scratch'
        )
