"""Calibration: set gamma and beta of a GN network so that it approximates a BN network.

BN's gamma and beta fit BN's statistics. With GN's statistics, the same values give other features,
and the error grows from layer to layer. Calibration visits the GN layers in order. It chooses gamma
and beta so that each output channel has the mean and standard deviation of the BN layer's output.

An error remains, because GN's statistics vary from image to image. They vary less if the channels
of a group are balanced. Balancing multiplies each filter by a nonzero factor: this changes the
statistics of the group, and gamma compensates for the factor.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import GroupNorm
from ..modeling.conv import StandardizedConv2d
from ..progress import progress

# Normalised channels with a smaller standard deviation count as constant: their gamma becomes 0
SILENT = 1e-3
# Channels with a standard deviation below this share of the layer's mean are not rescaled
FAINT = 1e-2
# Limit of the search for signs, which usually ends after three passes
MAX_PASSES = 10

# Name of a norm layer -> mean and standard deviation of its output, each of shape (C,)
Moments = Mapping[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def measured_moments(network: nn.Module, images: Tensor) -> Moments:
    """Measure the mean and standard deviation of each norm layer's output on `images`.

    Args:
        network: a ResNet in evaluation mode.
        images: (N, 3, H, W), normalised.

    Returns:
        name of the norm layer -> (mean, standard deviation), each of shape (C,).
    """
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        moments[name] = _channel_moments(output)

    with _hooks(network, nn.Module.register_forward_hook, measure):
        network(images)
    return moments


@torch.no_grad()
def calibrate(network: nn.Module, reference: nn.Module, images: Tensor, moments: Moments) -> None:
    """Set gamma and beta of every `GroupNorm`, layer after layer, in one forward pass.

    Each filter is first multiplied by its factor from `balance`. The product of filter and gamma
    keeps its sign, because the sign decides which values of a channel pass the ReLU.

    Args:
        network: a GN ResNet with the convolutions of `reference`; changed in place.
        reference: the original network, with the same layer names.
        images: (N, 3, H, W), normalised; about 100 unlabelled images.
        moments: target output moments of each layer, such as those of `measured_moments`.
    """
    signs = {name: norm.weight.sign() for name, norm in norm_layers(reference).items()}
    modules = dict(network.named_modules())
    layers = progress(signs, "calibrating layers", len(signs))

    def fit(name: str, norm: GroupNorm, inputs: tuple[Tensor]) -> tuple[Tensor]:
        next(layers)
        convolution = modules[name.removesuffix(".norm")]
        factors = balance(inputs[0], norm.num_groups)
        if isinstance(convolution, StandardizedConv2d):
            factors = factors.sign()  # standardisation undoes any scale of the filter
        convolution.weight.mul_(factors.view(-1, 1, 1, 1))
        x = inputs[0] * factors.view(-1, 1, 1)
        mean, std = _channel_moments(F.group_norm(x, norm.num_groups, eps=norm.eps))
        wanted_mean, wanted_std = moments[name]
        gain = torch.where(std > SILENT, wanted_std / std, torch.zeros_like(std))
        norm.weight.copy_(signs[name] * factors.sign() * gain)
        norm.bias.copy_(wanted_mean - norm.weight * mean)
        return (x,)

    with _hooks(network, nn.Module.register_forward_pre_hook, fit):
        network(images)


def balance(x: Tensor, num_groups: int) -> Tensor:
    """Factors for the channels that make group statistics vary less from image to image.

    The magnitudes give all channels the same standard deviation, so that none dominates its group.
    The signs let common variations of the channels cancel in the mean of the group. They come from
    a greedy search, which flips a channel if that lowers the variance of the group's mean.

    Args:
        x: (N, C, H, W), the output of a convolution.
        num_groups: number of groups, a divisor of C.

    Returns:
        nonzero factors of shape (C,).
    """
    std = x.std((0, 2, 3))
    strength = torch.where(std > FAINT * std.mean(), std / std.mean(), torch.ones_like(std))
    means = x.mean((2, 3)) / strength
    means = (means - means.mean(0)).view(len(x), num_groups, -1)
    covariance = torch.einsum("nij,nik->ijk", means, means)
    signs = torch.ones_like(covariance[:, 0])
    for _ in range(MAX_PASSES):
        before = signs.clone()
        for channel in range(signs.shape[1]):
            with_others = covariance[:, channel] * signs
            with_others[:, channel] = 0
            signs[:, channel] = torch.where(with_others.sum(1) > 0, -1.0, 1.0)
        if torch.equal(signs, before):
            break
    return signs.flatten() / strength


@contextmanager
def _hooks(network: nn.Module, register: Callable, hook: Callable) -> Iterator[None]:
    """Register `hook` on every norm layer, with the layer's name as its first argument."""
    handles = [register(norm, partial(hook, name)) for name, norm in norm_layers(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norm_layers(network: nn.Module) -> dict[str, Any]:
    """The norm layers of a ResNet, by name."""
    return {name: module for name, module in network.named_modules() if name.endswith("norm")}


def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x, dim=(0, 2, 3))
    return mean, std
