"""From a BN network to a GN one that computes nearly the same: gamma and beta set by measurement.

BN's gamma and beta belong to BN's statistics. Under GN's, the same values give other features, and
every layer adds to the error. Here each GN layer in turn gets the gamma and beta that bring its
output, channel by channel, to the mean and the standard deviation that the BN layer's output has.

What that cannot mend is that GN's statistics vary from picture to picture. They vary less where the
channels of a group are balanced: a filter may be multiplied by any number but 0, which gamma makes
up for, and the statistics of its group change.
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

# Below this a normalised channel (of variance 1 in its group) is taken to carry no signal
SILENT = 1e-3
# Below this part of the layer's mean standard deviation a channel is not made as strong as others
FAINT = 1e-2
# Of the search for signs, which mostly ends after three
MAX_PASSES = 10

Moments = Mapping[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def measured_moments(network: nn.Module, pictures: Tensor) -> Moments:
    """Mean and standard deviation, by layer, of what a network's norms put out on `pictures`.

    Args:
        network: a ResNet in evaluation mode.
        pictures: (N, 3, H, W), normalised as the network takes them.

    Returns:
        name of the norm layer -> (mean, standard deviation), each of shape (C,).
    """
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        moments[name] = _channel_moments(output)

    with _hooks(network, nn.Module.register_forward_hook, measure):
        network(pictures)
    return moments


@torch.no_grad()
def calibrate(network: nn.Module, reference: nn.Module, pictures: Tensor, moments: Moments) -> None:
    """Set gamma and beta of every `GroupNorm`, from the first layer on, in one forward pass.

    Each filter is multiplied by a number first, which `balance` gives.

    Args:
        network: a GN ResNet, changed in place; its convolutions are `reference`'s.
        reference: the network it comes from, whose layers go by the same names. Filter and gamma
            together keep their sign, which decides what of a channel the ReLU lets through.
        pictures: (N, 3, H, W), about 100 unlabelled ones.
        moments: those to reach, by layer, from `measured_moments` or `promised_moments`.
    """
    signs = {name: norm.weight.sign() for name, norm in norm_layers(reference).items()}
    modules = dict(network.named_modules())

    def fit(name: str, norm: GroupNorm, inputs: tuple[Tensor]) -> tuple[Tensor]:
        convolution = modules[name.removesuffix(".norm")]
        factors = balance(inputs[0], norm.num_groups)
        if isinstance(convolution, StandardizedConv2d):
            factors = factors.sign()  # the standardised filter has a scale of its own
        convolution.weight.mul_(factors.view(-1, 1, 1, 1))
        x = inputs[0] * factors.view(-1, 1, 1)
        mean, std = _channel_moments(F.group_norm(x, norm.num_groups, eps=norm.eps))
        wanted_mean, wanted_std = moments[name]
        gain = torch.where(std > SILENT, wanted_std / std, torch.zeros_like(std))
        norm.weight.copy_(signs[name] * factors.sign() * gain)
        norm.bias.copy_(wanted_mean - norm.weight * mean)
        return (x,)

    with _hooks(network, nn.Module.register_forward_pre_hook, fit):
        network(pictures)


def balance(x: Tensor, num_groups: int) -> Tensor:
    """What to multiply channels by, for statistics of groups that depend little on the picture.

    The magnitudes give all channels one standard deviation, so that none rules its group. The signs
    let cancel, in the group's mean, what channels have in common: each in turn is flipped where
    that lowers the variance of the group's mean between pictures, until none is.

    Args:
        x: (N, C, H, W), what a convolution puts out.

    Returns:
        (C,), none of them 0.
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
    """The hook on every norm, with the norm's name as its first argument."""
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
