"""Weight Standardization: each filter of a convolution gets mean 0 and standard deviation 1."""

import torch
from torch import Tensor


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the standardized weight of a convolution, which must be followed by a norm layer.

    Each filter w becomes (w - mean(w)) / (std(w) + eps), with the unbiased standard deviation, as
    in the authors' code (Qiao et al., "Weight Standardization", arXiv 1903.10520). The function is
    differentiable and computes in float32 or wider.

    Args:
        weight: filters of shape (out, in, *), each with at least two values.
        eps: added to the standard deviation.

    Returns:
        a tensor of the same shape and dtype.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    std, mean = torch.std_mean(wide, dim=tuple(range(1, weight.dim())), keepdim=True)
    return ((wide - mean) / (std + eps)).to(weight.dtype)
