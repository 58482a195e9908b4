"""Checks of the device, the weights file and the output folder."""

import os
from pathlib import Path

import torch
from detectron2.config import CfgNode

from ..errors import InputError


def check_machine(cfg: CfgNode) -> None:
    """Check that the device, weights file and output folder can be used; create the folder.

    Args:
        cfg: the config.

    Raises:
        InputError: if one of them cannot be used.
    """
    check_device(cfg)
    check_weights_file(cfg)
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be created: {error.strerror}"
        ) from None
    if not os.access(cfg.OUTPUT_DIR, os.W_OK):
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} is not writable")


def check_device(cfg: CfgNode) -> None:
    """Check that PyTorch can compute on `MODEL.DEVICE`.

    Raises:
        InputError: if it cannot.
    """
    name = cfg.MODEL.DEVICE
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"MODEL.DEVICE is {name}, but PyTorch sees no GPU: add MODEL.DEVICE cpu")
    try:
        torch.zeros(1, device=name).item()
    # PyTorch reports devices that it was not built for with several types
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise InputError(f"MODEL.DEVICE {name} cannot be used: {reason}") from None


def check_weights_file(cfg: CfgNode) -> None:
    """Raise an `InputError` if `MODEL.WEIGHTS` is a path and no file exists there."""
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]
    if weights and "://" not in weights and not os.path.isfile(weights):
        reason = "is a folder" if os.path.isdir(weights) else "does not exist"
        raise InputError(
            f"MODEL.WEIGHTS {weights} {reason}: name a backbone or detector checkpoint, "
            'or set it to "" with MODEL.BACKBONE.FREEZE_AT 0 to train from scratch'
        )
