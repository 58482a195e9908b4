"""Conversion of a BN backbone to Group Normalization with unlabelled images."""

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..config import as_opts
from ..data.unlabelled_images import load_images
from ..errors import InputError
from ..modeling.norm import backbone_norm, backbone_section, is_group_norm
from .calibrate import calibrate, measured_moments
from .conversion import Conversion
from .convert import build_network, merge_pairs
from .distill import distill, feature_errors
from .facts import GROUP_NORM
from .recipe import FINE_TUNING, GROUPING

# Default number of images for calibration and distillation
NUM_IMAGES = 128

# Height and width of these images in pixels
SIDE = 256


def to_group_norm(
    conversion: Conversion,
    opts: Sequence[str],
    images: Iterable[Path],
    distill_steps: int = 0,
    state: Path | None = None,
) -> None:
    """Convert a backbone to Group Normalization, in place, with unlabelled images.

    `calibrate` sets gamma and beta of each layer. Label-free distillation can follow; its result
    is kept only if it lowers the feature errors.

    Args:
        conversion: a BN or FrozenBN backbone, or a GN backbone with another grouping.
        opts: `KEY VALUE` pairs; the `MODEL.GROUP_NORM` keys set the new grouping. Without any, a
            BN backbone gets the `GROUPING` of the recipe.
        images: about 100 image files, preferably from the detector's training set.
        distill_steps: number of distillation steps, 0 for none.
        state: file that an interrupted distillation resumes from, as in `distill`.

    Raises:
        InputError: if a tensor is missing, the groups do not divide a layer's channels, or an
            image cannot be read.
    """
    network, reference, x, cfg = build_pair(conversion, opts, images)
    calibrate(network, reference, x, measured_moments(reference, x))
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    errors = measure(network, reference, x)
    if distill_steps:
        distill(network, reference, x, distill_steps, state)
        distilled = measure(network, reference, x)
        if sum(distilled.values()) < sum(errors.values()):
            tensors, errors = dict(network.state_dict()), distilled
        else:
            logging.getLogger(__name__).warning(
                f"{distill_steps} distillation steps did not lower the feature errors, so the "
                "calibrated weights are kept: use a few hundred steps"
            )
    text = ", ".join(f"{name} {100 * error:.0f}%" for name, error in errors.items())
    conversion.errors = text
    logging.getLogger(__name__).info(
        f"converted to GN with {len(x)} images; mean squared error of the features, relative to "
        f"their variance: {text}"
    )
    if not is_group_norm(backbone_norm(conversion.cfg)):
        conversion.recipe = dict(FINE_TUNING)
    conversion.cfg, conversion.tensors = cfg, tensors


def build_pair(
    conversion: Conversion, opts: Sequence[str], images: Iterable[Path]
) -> tuple[nn.Module, nn.Module, Tensor, CfgNode]:
    """Build the GN network and the one that it is converted from.

    Args:
        conversion, opts, images: as in `to_group_norm`.

    Returns:
        both networks, with equal filters; the images as a normalised batch (N, 3, H, W); and the
        config of the GN network.

    Raises:
        InputError: as in `to_group_norm`.
    """
    cfg = conversion.cfg.clone()
    cfg.MODEL[backbone_section(cfg)].NORM = "GN"
    if conversion.missing:
        raise InputError(f"{conversion.missing[0]} is missing: --calibrate needs every tensor")
    if not {*GROUP_NORM} & {*opts[::2]} and not is_group_norm(backbone_norm(conversion.cfg)):
        opts = [*as_opts(GROUPING), *opts]
    merge_pairs(cfg, opts)
    network = build_network(cfg, conversion.tensors)
    reference = build_network(conversion.cfg, conversion.tensors)
    x = normalise(load_images(images, SIDE, cfg.INPUT.FORMAT), cfg)
    return network, reference, x, cfg


@torch.no_grad()
def measure(network: nn.Module, reference: nn.Module, x: Tensor) -> dict[str, float]:
    """`feature_errors` on the first 32 images of `x`; infinite where the network gives NaN."""
    errors = feature_errors(network(x[:32]), reference(x[:32]))
    return {name: error.nan_to_num(math.inf).item() for name, error in errors.items()}


def normalise(images: Tensor, cfg: CfgNode) -> Tensor:
    """Subtract `MODEL.PIXEL_MEAN` and divide by `MODEL.PIXEL_STD`.

    Args:
        images: (N, 3, H, W), 0 to 255, channels in the order of `INPUT.FORMAT`.

    Returns:
        float32 of the same shape, on `MODEL.DEVICE`.
    """
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return ((images - mean) / std).to(cfg.MODEL.DEVICE)
