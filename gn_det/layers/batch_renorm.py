"""Batch Renormalization: BatchNorm whose training depends less on the other images of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchRenorm2d(nn.BatchNorm2d):
    """Batch Renormalization (Ioffe, arXiv 1702.03275), a baseline of the paper's Section 4.1.

    In training, x is normalized with the statistics of the batch and then corrected towards the
    running ones: (x - mean) / std * r + d. Here r is std / running std, clipped to [1 / r_max,
    r_max], and d is (mean - running mean) / running std, clipped to [-d_max, d_max]. Both are
    constants in the backward pass, and are computed from the running statistics before their
    update. In evaluation it is BatchNorm, whose tensors it has.

    Args:
        num_channels: C of inputs of shape (N, C, H, W).
        r_max, d_max: limits of the correction; 1 and 0 make it BatchNorm. The paper that gn_det
            follows uses the defaults, in Table 2 at a batch of 4.
    """

    def __init__(self, num_channels: int, r_max: float = 1.5, d_max: float = 0.5) -> None:
        super().__init__(num_channels)
        self.r_max, self.d_max = r_max, d_max

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        weight, bias, mean, variance = self.weight, self.bias, self.running_mean, self.running_var
        assert mean is not None and variance is not None and self.num_batches_tracked is not None
        with torch.no_grad():
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            axes = [axis for axis in range(x.dim()) if axis != 1]
            batch_variance, batch_mean = torch.var_mean(wide, axes, correction=0)
            std, batch_std = (torch.sqrt(v + self.eps) for v in (variance, batch_variance))
            r = (batch_std / std).clamp(1 / self.r_max, self.r_max)
            d = ((batch_mean - mean) / std).clamp(-self.d_max, self.d_max)
            self.num_batches_tracked += 1
        # weight * (normalized * r + d) + bias
        return F.batch_norm(
            x, mean, variance, weight * r, weight * d + bias, True, self.momentum or 0.0, self.eps
        )
