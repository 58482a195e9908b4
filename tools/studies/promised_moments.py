"""The outputs that BN's beta and gamma promise, instead of those measured on images."""

from torch import Tensor, nn

from gn_det.checkpoint.calibrate import Moments, norm_layers


def promised_moments(network: nn.Module, _: Tensor) -> Moments:
    """Mean and standard deviation, by layer, that BN's beta and gamma stand for on its own data.

    Args:
        network: a BN ResNet. It is not run; images are an argument as in `measured_moments`.

    Returns:
        name of the norm layer -> (mean, standard deviation), each of shape (C,).
    """
    layers = norm_layers(network)
    return {name: (norm.bias.detach(), norm.weight.abs()) for name, norm in layers.items()}
