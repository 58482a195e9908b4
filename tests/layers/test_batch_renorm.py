"""Batch Renormalization against its published formula in float64."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.testing import assert_close

from gn_det.layers import BatchRenorm2d


def layer(r_max=1.5, d_max=0.5) -> BatchRenorm2d:
    """With running statistics that are neither those of new layers nor those of the batch."""
    torch.manual_seed(0)
    made = BatchRenorm2d(6, r_max, d_max).double()
    made.weight.data.uniform_(0.5, 2)
    made.bias.data.normal_()
    made.running_mean.normal_()
    made.running_var.uniform_(0.1, 4)
    return made


def formula(x, norm):
    """Algorithm 1 of arXiv 1702.03275."""
    mean = x.mean((0, 2, 3), keepdim=True)
    std = ((x - mean).square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
    old_mean = norm.running_mean.view(1, -1, 1, 1)
    old_std = (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt()
    r = (std / old_std).clip(1 / norm.r_max, norm.r_max).detach()
    d = ((mean - old_mean) / old_std).clip(-norm.d_max, norm.d_max).detach()
    return ((x - mean) / std * r + d) * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("limits", [(1.5, 0.5), (3.0, 5.0), (1.0, 0.0)])
def test_training(limits):
    norm = layer(*limits)
    x = (3 * torch.randn(2, 6, 4, 5, dtype=torch.float64) + 1).requires_grad_()
    expected = formula(x, norm)
    wanted = torch.autograd.grad((expected**2).sum(), [x, norm.weight, norm.bias])
    y = norm(x)
    assert_close(y, expected)
    found = torch.autograd.grad((y**2).sum(), [x, norm.weight, norm.bias])
    for one, two in zip(found, wanted, strict=True):
        assert_close(one, two)


def test_it_is_batch_norm_without_a_correction():
    """Also its running statistics, and in evaluation with any limits."""
    norm, plain = layer(1.0, 0.0), nn.BatchNorm2d(6).double()
    plain.load_state_dict(norm.state_dict())
    for _ in range(3):
        x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
        assert_close(norm(x), plain(x))
    for name, value in plain.state_dict().items():
        assert_close(norm.state_dict()[name], value)
    other = layer()
    plain.load_state_dict(other.state_dict())
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_close(other.eval()(x), plain.eval()(x))


def test_it_freezes_like_batch_norm():
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(layer()))[0]
    assert isinstance(frozen, FrozenBatchNorm2d)
    assert_close(frozen.running_var, layer().running_var)
