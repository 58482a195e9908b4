"""Conversion of a BN backbone to Group Normalization, on unlabelled images."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..data.unlabelled_images import load_images
from ..errors import InputError
from .calibrate import Moments, calibrate, measured_moments
from .convert import Conversion, build_resnet, merge_pairs
from .distill import distill, feature_errors

# Of the pictures that gamma and beta are measured on
NUM_IMAGES = 128


SIDE = 256


def to_group_norm(
    conversion: Conversion,
    opts: Sequence[str],
    pictures: Iterable[Path],
    distill_steps: int = 0,
    moments: Callable[[nn.Module, Tensor], Moments] = measured_moments,
) -> None:
    """Make a GN network of a converted one, in place, by measurement on unlabelled pictures.

    Args:
        conversion: BN, frozen or not, or GN of another division into groups.
        opts: `KEY VALUE` pairs; `MODEL.GROUP_NORM` tells the new division.
        pictures: about 100 files, best of those that the detector will be trained on.
        distill_steps: of the training that follows, without labels.
        moments: gives the outputs to reach, from the network that is converted and the pictures.

    Raises:
        InputError: for groups that do not divide a layer's channels, and unreadable pictures.
    """
    cfg = conversion.cfg.clone()
    cfg.MODEL.RESNETS.NORM = "GN"
    if conversion.missing:
        raise InputError(f"{conversion.missing[0]} is missing: it cannot be measured on")
    merge_pairs(cfg, opts)
    network = build_resnet(cfg, conversion.tensors)
    reference = build_resnet(conversion.cfg, conversion.tensors)
    x = normalise(load_images(pictures, SIDE, cfg.INPUT.FORMAT), cfg)
    calibrate(network, reference, x, moments(reference, x))
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    errors = measure(network, reference, x)
    if distill_steps:
        distill(network, reference, x, distill_steps)
        distilled = measure(network, reference, x)
        if sum(distilled.values()) < sum(errors.values()):
            tensors, errors = dict(network.state_dict()), distilled
        else:
            logging.getLogger(__name__).warning(
                f"{distill_steps} steps of distillation brought the features no nearer: the "
                "calibrated network is kept; take some hundreds of steps"
            )
    told = ", ".join(f"{name} {100 * error:.0f}%" for name, error in errors.items())
    logging.getLogger(__name__).info(
        f"GN on {len(x)} pictures; features differ from {conversion.source}'s by {told} of "
        "their variance"
    )
    conversion.cfg, conversion.tensors = cfg, tensors


@torch.no_grad()
def measure(network: nn.Module, reference: nn.Module, x: Tensor) -> dict[str, float]:
    """`feature_errors` on some of the pictures, infinite for a network that has come to NaN."""
    errors = feature_errors(network(x[:32]), reference(x[:32]))
    return {name: error.nan_to_num(math.inf).item() for name, error in errors.items()}


def normalise(pictures: Tensor, cfg: CfgNode) -> Tensor:
    """Pictures (N, 3, H, W) of `INPUT.FORMAT` as the network takes them, on its device."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return ((pictures - mean) / std).to(cfg.MODEL.DEVICE)
