"""Weight normalization (Salimans and Kingma, arXiv 1602.07868): filters of a learned length."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized


class WeightNormConv2d(Conv2d):
    """A convolution whose filters are gain * v / |v|, with a bias instead of a norm layer.

    Gain and bias are set by the first training batch, so that each output channel has mean 0 and
    the standard deviation `scale` over it (Section 3 of the paper). Without that, the features of
    50 layers vanish or explode. Several processes use the average of their statistics.

    Attributes:
        scale: 1, or 0 for the last convolution of a residual block that starts as an identity.
        initialized: whether gain and bias are set; a buffer, so that a resumed run keeps them.
    """

    scale = 1.0
    initialized: Tensor
    _trained = False

    def forward(self, x: Tensor) -> Tensor:
        # A flag besides the buffer, whose value a GPU would have to wait for in each step
        if self.training and not self._trained:
            if not self.initialized:
                self._initialize(x)
            self._trained = True
        return super().forward(x)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        geometry = self.stride, self.padding, self.dilation, self.groups
        std, mean = torch.std_mean(F.conv2d(x, self.weight, None, *geometry).float(), (0, 2, 3))
        if (processes := comm.get_world_size()) > 1:
            for value in (std, mean):
                torch.distributed.all_reduce(value)
                value /= processes
        factor = self.scale / std.clamp(min=1e-8)
        self.parametrizations.weight.original0.mul_(factor.view(-1, 1, 1, 1))
        assert self.bias is not None
        self.bias.copy_(-mean * factor)
        self.initialized.fill_(True)


def normalize_weights(network: nn.Module) -> None:
    """Replace the BatchNorm after each convolution by weight normalization, in place.

    Args:
        network: a backbone that was built with "BN".
    """
    convs: list[Any] = [module for module in network.modules() if type(module) is Conv2d]
    for conv in convs:
        if isinstance(conv.norm, nn.BatchNorm2d):
            conv.norm = None
            conv.__class__ = WeightNormConv2d
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
            conv.register_buffer("initialized", torch.tensor(False, device=conv.weight.device))
            weight_norm(conv)


def folded_weights(network: nn.Module) -> dict[str, Tensor]:
    """The state of a backbone, in which weight normalization is folded into plain weights."""
    state = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, WeightNormConv2d) and is_parametrized(module):
            for own in ("parametrizations.weight.original0", "parametrizations.weight.original1"):
                del state[f"{name}.{own}"]
            del state[f"{name}.initialized"]
            state[f"{name}.weight"] = module.weight.detach()
    return state
