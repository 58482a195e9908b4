"""A convolution that is recomputed with its norm, against the two operators one after the other."""

import pytest
import torch
import torch.nn.functional as F
from studies.saved_bytes import saved_bytes
from torch import nn
from torch.testing import assert_close

from gn_det.layers import conv_group_norm_act, group_norm_act, recompute_activations

GEOMETRY = (2, 1), (1, 1), (1, 1), 2


def make(dtype=torch.float32, layout=torch.contiguous_format, residual=True, conv_bias=True):
    """Input, filters, bias of the convolution, gamma, beta and residual."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 7, dtype=dtype).to(memory_format=layout)
    filters = torch.randn(8, 3, 3, 3, dtype=dtype)
    vectors = torch.randn(3, 8, dtype=dtype)
    added = torch.randn(2, 8, 5, 7, dtype=dtype) if residual else None
    return [x, filters, vectors[0] if conv_bias else None, vectors[1], vectors[2], added]


def separate(x, filters, conv_bias, weight, bias, residual, relu=True):
    out = F.conv2d(x, filters, conv_bias, *GEOMETRY)
    return group_norm_act(out, weight, bias, 4, 1e-5, residual, relu)


def together(x, filters, conv_bias, weight, bias, residual, relu=True):
    return conv_group_norm_act(
        x, filters, conv_bias, GEOMETRY, weight, bias, 4, 1e-5, residual, relu
    )


def formula(x, filters, conv_bias, weight, bias, residual, relu=True):
    """In PyTorch's own operators."""
    out = F.group_norm(F.conv2d(x, filters, conv_bias, *GEOMETRY), 4, weight, bias, 1e-5)
    out = out if residual is None else out + residual
    return F.relu(out) if relu else out


def gradients(function, inputs, **kwargs):
    leaves = [t if t is None else t.clone().requires_grad_() for t in inputs]
    y = function(*leaves, **kwargs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("residual", "conv_bias"), [(True, False), (False, True)])
def test_same_bits_as_the_two_operators(layout, relu, residual, conv_bias):
    inputs = make(layout=layout, residual=residual, conv_bias=conv_bias)
    pairs = zip(
        gradients(together, inputs, relu=relu), gradients(separate, inputs, relu=relu), strict=True
    )
    assert all(torch.equal(one, two) and one.stride() == two.stride() for one, two in pairs)


def test_gradients_in_float64():
    inputs = make(torch.float64)
    for one, two in zip(gradients(together, inputs), gradients(formula, inputs), strict=True):
        assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_mixed_precision():
    """The convolution runs in bfloat16, and parameters get gradients in float32."""
    inputs = make()
    with torch.autocast("cpu", torch.bfloat16):
        one, two = gradients(together, inputs), gradients(separate, inputs)
    assert one[0].dtype == torch.bfloat16 and one[1].dtype == torch.float32
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, two, strict=True))


def test_only_the_input_is_saved():
    x, filters, _, weight, bias, _ = make(residual=False)
    x.requires_grad_()
    saved = saved_bytes(lambda: together(x, filters, None, weight, bias, None).sum())
    small = 4 * (filters.numel() + weight.numel() + bias.numel() + 2 * 2 * 4)
    assert saved <= 4 * x.numel() + small


def test_an_input_that_is_recomputed_itself():
    """Of the norm before it, only the input is saved."""
    x, filters, conv_bias, weight, bias, residual = make()
    norm = nn.GroupNorm(2, 6)

    def chain(enabled):
        image = x.clone().requires_grad_()
        with recompute_activations(enabled):
            a = group_norm_act(image, norm.weight, norm.bias, 2, relu=True)
            y = together(a, filters, conv_bias, weight, bias, residual)
        y.sum().backward()
        return image.grad

    assert torch.equal(chain(True), chain(False))


def test_filters_alone_get_a_gradient():
    x, filters, _, weight, bias, _ = make()
    filters.requires_grad_()
    together(x, filters, None, weight, bias, None).sum().backward()
    assert filters.grad is not None and x.grad is None


def test_second_derivatives_are_refused():
    x, *others = make()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(together(x, *others).sum(), x, create_graph=True)
