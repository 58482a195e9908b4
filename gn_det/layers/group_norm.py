"""Group Normalization layers: statistics per image and group of channels, not over the batch."""

from torch import Tensor, nn

from .group_norm_act import group_norm_act


def count_groups(num_channels: int, num_groups: int = 32, dim_per_gp: int = -1) -> int:
    """Return the number of groups that `num_channels` channels are divided into.

    Args:
        num_channels: C.
        num_groups: number of groups G, used if `dim_per_gp` is -1.
        dim_per_gp: channels per group C/G, or -1 to use `num_groups`.

    Raises:
        ValueError: if C is not divisible by it; the message gives the nearest valid values.
    """
    value, unit = (dim_per_gp, "channels per group") if dim_per_gp > 0 else (num_groups, "groups")
    if value < 1 or num_channels % value:
        divisors = [d for d in range(1, num_channels + 1) if num_channels % d == 0]
        below = [d for d in divisors if d < value][-1:]
        above = [d for d in divisors if d > value][:1]
        nearest = " or ".join(map(str, below + above))
        message = f"{num_channels} channels do not divide into {value} {unit} (use {nearest})"
        raise ValueError(message)
    return num_channels // dim_per_gp if dim_per_gp > 0 else num_groups


class GroupNorm(nn.GroupNorm):
    """Group Normalization (Wu and He, ECCV 2018, Eq. 1 and 7).

    Maps an (N, C, *) tensor to one of the same shape. Each group of C/G consecutive channels of
    each image is normalized to mean 0 and variance 1. Each channel is then multiplied by `weight`
    (gamma) and shifted by `bias` (beta), both of shape (C,). One group gives the paper's Layer
    Normalization, one channel per group its Instance Normalization.

    It subclasses `nn.GroupNorm` because optimizers, such as Detectron2's, find the parameters of
    norm layers by type.

    Args:
        num_channels: C.
        num_groups: number of groups G, used if `dim_per_gp` is -1.
        dim_per_gp: channels per group C/G, or -1 to use `num_groups`.
        eps: added to each group's variance.

    Raises:
        ValueError: if the channels do not divide into the groups; see `count_groups`.
    """

    def __init__(
        self, num_channels: int, num_groups: int = 32, dim_per_gp: int = -1, eps: float = 1e-5
    ) -> None:
        super().__init__(count_groups(num_channels, num_groups, dim_per_gp), num_channels, eps)


class GroupNormAct(GroupNorm):
    """`GroupNorm` that also adds a residual and applies a ReLU, in one operator, `group_norm_act`.

    Attributes:
        relu: whether to apply the ReLU.
    """

    relu = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return group_norm_act(
            x, self.weight, self.bias, self.num_groups, self.eps, residual, self.relu
        )
