"""GroupNorm against the paper's formulas in float64, and against numbers worked out by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gn_det.layers import GroupNorm

# N=3, C=4, H=1, W=2
A = [[2, 3], [5, 7], [11, 13], [17, 19]]
B = [[0, 1], [1, 2], [3, 5], [8, 13]]
C = [[1, 2], [3, 4], [5, 6], [7, 8]]
BATCH = torch.tensor([A, B, C], dtype=torch.float32).unsqueeze(2)


def reference(x: torch.Tensor, num_groups: int, eps: float = 1e-5) -> torch.Tensor:
    """Equations 1 and 7 of the paper, one group at a time."""
    x = x.double()
    y = torch.empty_like(x)
    width = x.shape[1] // num_groups
    for n in range(len(x)):
        for start in range(0, x.shape[1], width):
            group = x[n, start : start + width]
            mean = group.mean()
            variance = ((group - mean) ** 2).mean()
            y[n, start : start + width] = (group - mean) / torch.sqrt(variance + eps)
    return y


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ({"num_groups": 2}, [[-1.172, -0.651], [0.391, 1.432], [-1.265, -0.633], [0.633, 1.265]]),
        ({"num_groups": 1}, [[-1.276, -1.108], [-0.773, -0.439], [0.230, 0.565], [1.234, 1.568]]),
        ({"dim_per_gp": 1}, [[-1, 1], [-1, 1], [-1, 1], [-1, 1]]),
    ],
    ids=["GN", "LN", "IN"],
)
def test_worked_example(grouping, expected):
    y = GroupNorm(4, **grouping)(BATCH)
    assert_close(y[0, :, 0], torch.tensor(expected, dtype=torch.float32), atol=1e-3, rtol=0)


def test_worked_example_of_batch_norm():
    """In contrast, BN's result for the same image depends on the two other images too."""
    y = nn.BatchNorm2d(4)(BATCH)
    expected = [[0.522, 1.567], [0.676, 1.690], [1.071, 1.630], [1.066, 1.492]]
    assert_close(y[0, :, 0], torch.tensor(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (1, 64, 3, 3), (3, 32, 9), (4, 32, 1, 2)])
def test_formula_in_float64(num_groups, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 3
    layer = GroupNorm(shape[1], num_groups)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    affine = (-1, *[1] * (len(shape) - 2))
    expected = reference(x, num_groups) * layer.weight.view(affine) + layer.bias.view(affine)
    assert_close(layer(x), expected.float(), atol=5e-5, rtol=5e-5)


def test_gradients_in_float64():
    layer = GroupNorm(6, num_groups=3).double()
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_channels_per_group():
    x = torch.randn(2, 48, 4, 4)
    assert_close(GroupNorm(48, dim_per_gp=16)(x), reference(x, 3).float(), atol=1e-5, rtol=1e-5)


def test_epsilon():
    x = torch.randn(2, 4, 3, 3) * 1e-3
    expected = reference(x, 2, eps=1e-2).float()
    assert_close(GroupNorm(4, 2, eps=1e-2)(x), expected, atol=1e-6, rtol=1e-5)


def test_no_rois():
    x = torch.zeros(0, 64, 7, 7, requires_grad=True)
    layer = GroupNorm(64)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert_close(layer.weight.grad, torch.zeros(64))


def test_type_and_state_are_those_of_nn_group_norm():
    layer = GroupNorm(64, 32)
    assert isinstance(layer, nn.GroupNorm)
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("channels", "grouping", "nearest"),
    [
        (48, {"num_groups": 32}, "24 or 48"),
        (64, {"num_groups": 0}, "1"),
        (64, {"num_groups": 100}, "64"),
        (48, {"dim_per_gp": 32}, "24 or 48"),
    ],
)
def test_channels_that_do_not_divide(channels, grouping, nearest):
    with pytest.raises(ValueError, match=rf"{channels} channels .* \(use {nearest}\)"):
        GroupNorm(channels, **grouping)
