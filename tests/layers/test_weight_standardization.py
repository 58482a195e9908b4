"""Moments, gradient and precision of the standardized weight."""

import pytest
import torch
from torch.testing import assert_close

from gn_det.layers import standardize_weight


@pytest.mark.parametrize("shape", [(4, 3, 7, 7), (8, 2, 1, 1), (5, 16, 3, 3)])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.02), (100.0, 1e-2)])
def test_moments(shape, mean, std):
    torch.manual_seed(0)
    weight = mean + std * torch.randn(shape, dtype=torch.float64)
    filters = standardize_weight(weight).flatten(1)
    assert_close(filters.mean(dim=1), torch.zeros(shape[0], dtype=torch.float64))
    # The epsilon is added to the standard deviation
    expected = weight.flatten(1).std(dim=1)
    assert_close(filters.std(dim=1), expected / (expected + 1e-5))


def test_gradient():
    weight = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardize_weight, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """Rounding the mean to half precision would cost a large part of the standard deviation."""
    torch.manual_seed(0)
    weight = (1.001 + 5e-3 * torch.randn(4, 64, 3, 3)).to(dtype)
    expected = standardize_weight(weight.float())
    actual = standardize_weight(weight)
    assert actual.dtype == dtype
    assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)


def test_constant_filters_become_zero():
    assert standardize_weight(torch.full((2, 3, 3, 3), 5.0)).abs().max() < 1e-3
