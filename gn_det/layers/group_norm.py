"""Group Normalization: statistics over groups of an image's channels, never over the batch."""

from torch import Tensor, nn

from .group_norm_act import group_norm_act


def count_groups(num_channels: int, num_groups: int = 32, dim_per_gp: int = -1) -> int:
    """Number of groups that `num_channels` channels are divided into.

    Args:
        num_channels: C.
        num_groups: G, used unless `dim_per_gp` is given.
        dim_per_gp: channels per group, C/G; -1 leaves the choice to `num_groups`.

    Raises:
        ValueError: if the channels do not divide; the message gives the nearest values that work.
    """
    asked, what = (dim_per_gp, "channels per group") if dim_per_gp > 0 else (num_groups, "groups")
    if asked < 1 or num_channels % asked:
        divisors = [d for d in range(1, num_channels + 1) if num_channels % d == 0]
        below = [d for d in divisors if d < asked][-1:]
        above = [d for d in divisors if d > asked][:1]
        near = " or ".join(map(str, below + above))
        raise ValueError(f"{num_channels} channels do not divide into {asked} {what} (use {near})")
    return num_channels // dim_per_gp if dim_per_gp > 0 else num_groups


class GroupNorm(nn.GroupNorm):
    """Group Normalization (Wu and He, ECCV 2018, Eq. 1 and 7) by group count or by group width.

    Maps an (N, C, *) tensor to one of the same shape: each group of C/G contiguous channels of each
    image is brought to mean 0 and variance 1, then scaled by `weight` (gamma) and shifted by `bias`
    (beta), both of shape (C,). One group is the paper's Layer Normalization, one channel per group
    its Instance Normalization. A subclass of `nn.GroupNorm`, because optimizers, Detectron2's among
    them, find norm parameters by type.

    Raises:
        ValueError: if the channels do not divide, as `count_groups`.
    """

    def __init__(
        self, num_channels: int, num_groups: int = 32, dim_per_gp: int = -1, eps: float = 1e-5
    ) -> None:
        super().__init__(count_groups(num_channels, num_groups, dim_per_gp), num_channels, eps)


class GroupNormAct(GroupNorm):
    """`GroupNorm` that adds a residual and applies ReLU in the same operator, `group_norm_act`.

    Attributes:
        relu: whether it ends with a ReLU.
    """

    relu = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return group_norm_act(
            x, self.weight, self.bias, self.num_groups, self.eps, residual, self.relu
        )
