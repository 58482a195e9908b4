"""Conversion by the outputs that BN's beta and gamma promise, instead of measured ones."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from gn_det.checkpoint.bn_to_gn import build_pair
from gn_det.checkpoint.calibrate import Moments, calibrate, norm_layers
from gn_det.checkpoint.conversion import Conversion


def to_promised_group_norm(
    conversion: Conversion, opts: Sequence[str], images: Iterable[Path]
) -> None:
    """Convert a backbone as `gn_det.checkpoint.bn_to_gn.to_group_norm`, to promised moments."""
    network, reference, x, cfg = build_pair(conversion, opts, images)
    calibrate(network, reference, x, promised_moments(reference, x))
    conversion.cfg, conversion.tensors = cfg, dict(network.state_dict())


def promised_moments(network: nn.Module, _: Tensor) -> Moments:
    """Mean and standard deviation of each BN layer's outputs on its training data.

    These are beta and the absolute value of gamma, so the network is not run. The second argument
    is only there to match `measured_moments`.

    Args:
        network: a BN ResNet.

    Returns:
        {name of the norm layer: (mean, standard deviation)}, each of shape (C,).
    """
    layers = norm_layers(network)
    return {name: (norm.bias.detach(), norm.weight.abs()) for name, norm in layers.items()}
