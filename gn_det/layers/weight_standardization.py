"""Weight Standardization: every filter of a convolution has mean 0 and standard deviation 1."""

import torch
from torch import Tensor


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The weight that a weight-standardised convolution convolves with.

    Each filter w becomes (w - mean(w)) / (std(w) + eps), with the unbiased standard deviation, as
    the authors' own code has it (Qiao et al., "Weight Standardization", arXiv 1903.10520).
    Differentiable, computed in float32 or wider, and meant for convolutions that a norm follows.

    Args:
        weight: filters of shape (out, in, *), with two values or more each.

    Returns:
        a tensor of the same shape and dtype.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    std, mean = torch.std_mean(wide, dim=tuple(range(1, weight.dim())), keepdim=True)
    return ((wide - mean) / (std + eps)).to(weight.dtype)
