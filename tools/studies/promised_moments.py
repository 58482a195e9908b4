"""Output moments of BN layers as given by beta and gamma, instead of measured on images."""

from torch import Tensor, nn

from gn_det.checkpoint.calibrate import Moments, norm_layers


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
