"""The operators in PyTorch: derivatives, dtypes, memory, compilation, and invalid arguments."""

import gc

import pytest
import torch
import torch.nn.functional as F
from studies.saved_bytes import saved_bytes
from torch import library, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from gn_det.layers import GroupNormAct, frozen_bn_act, group_norm_act, recompute_activations

CASES = {
    "linear": (False, False),
    "relu": (False, True),
    "residual": (True, False),
    "residual, relu": (True, True),
}


def inputs(shape=(2, 8, 5, 6), dtype=torch.float32, requires_grad=False):
    torch.manual_seed(0)
    x, residual = (torch.randn(shape).to(dtype).requires_grad_(requires_grad) for _ in range(2))
    kind = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.randn(8, dtype=kind).requires_grad_(requires_grad) for _ in range(2))
    return x, weight, bias, residual


@pytest.mark.parametrize("case", CASES)
def test_derivatives(case):
    residual, relu = CASES[case]

    def act(x, weight, bias, r):
        return group_norm_act(x, weight, bias, 4, 1e-5, r if residual else None, relu)

    assert torch.autograd.gradcheck(act, inputs(dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_frozen_bn(case):
    residual, relu = CASES[case]
    x, weight, bias, r = inputs(dtype=torch.float64, requires_grad=True)
    vectors = weight.detach(), bias.detach(), torch.randn(8).double(), torch.rand(8).double() + 0.1

    def act(x, r):
        return frozen_bn_act(x, *vectors, 1e-5, r if residual else None, relu)

    assert torch.autograd.gradcheck(act, (x, r))
    y = F.batch_norm(x, vectors[2], vectors[3], *vectors[:2], eps=1e-5)
    y = y + r if residual else y
    assert_close(act(x, r), F.relu(y) if relu else y)


def test_second_derivatives_are_refused():
    x, weight, bias, _ = inputs(requires_grad=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*torch\.nn\.functional\.group_norm"):
        torch.autograd.grad(group_norm_act(x, weight, bias, 4).sum(), x, create_graph=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_half_precision(memory_format, dtype, case):
    """The exact result, rounded once, because statistics and affine are computed in float32."""
    has_residual, relu = CASES[case]
    x, weight, bias, residual = inputs(dtype=dtype)
    x, residual = (t.to(memory_format=memory_format) for t in (x + 20, residual))
    residual = residual if has_residual else None
    y = group_norm_act(x, weight, bias, 4, 1e-5, residual, relu)
    exact = F.group_norm(x.double(), 4, weight.double(), bias.double())
    exact = exact if residual is None else exact + residual.double()
    exact = exact.clamp(min=0) if relu else exact
    assert y.dtype == dtype and y.stride() == x.stride()
    assert_close(y.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-4)


def test_autocast_keeps_the_dtype_of_the_convolution():
    conv, (x, weight, bias, _) = nn.Conv2d(8, 8, 1), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = group_norm_act(conv(x), weight, bias, 4, relu=True)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_no_images():
    """A batch without any positive RoI."""
    x, weight, bias, residual = inputs((0, 8, 7, 7), requires_grad=True)
    y = group_norm_act(x, weight, bias, 4, 1e-5, residual, relu=True)
    y = frozen_bn_act(y, *torch.ones(4, 8), relu=True)
    y.sum().backward()
    assert y.shape == x.grad.shape == residual.grad.shape == (0, 8, 7, 7)
    assert not weight.grad.any() and not bias.grad.any()


def test_other_strides_and_dimensions():
    x, weight, bias, residual = inputs()
    expected = F.group_norm(x[..., ::2], 4, weight, bias) + residual[..., ::2]
    assert_close(
        group_norm_act(x[..., ::2], weight, bias, 4, residual=residual[..., ::2]), expected
    )
    # (N, C, L)
    assert_close(
        group_norm_act(x[..., 0], weight, bias, 4), F.group_norm(x[..., 0], 4, weight, bias)
    )


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_for_the_backward_pass(dtype, size):
    """Per element of a convolution's output: the output, and the ReLU's unless it is recomputed."""
    convs = [nn.Conv2d(8, 8, 1, bias=False).to(dtype) for _ in range(4)]
    x, weight, bias, _ = inputs((2, 8, 64, 64), dtype)

    def forward(norm):
        y = x
        for conv in convs[:3]:
            y = norm(conv(y))
        return convs[3](y)

    def fused(y):
        return group_norm_act(y, weight.requires_grad_(), bias.requires_grad_(), 4, relu=True)

    def recomputed():
        with recompute_activations():
            return forward(fused)

    def plain(y):
        return F.relu_(F.group_norm(y, 4, weight.to(dtype), bias.to(dtype)))

    def frozen(y):
        return frozen_bn_act(y, *torch.ones(4, 8), relu=True)

    # Statistics and vectors take less than a tenth of a byte per element
    for function, expected in (
        (lambda: forward(plain), 2 * size),
        (lambda: forward(fused), 2 * size),
        (recomputed, size),
        (lambda: forward(frozen), size),
    ):
        assert saved_bytes(function) / (3 * x.numel()) == pytest.approx(expected, abs=0.1)


def alive_after(forward) -> list[bool]:
    """Whether each tensor that `forward` returns is still alive once only its graph may hold it."""
    tensors = [StorageWeakRef(t.untyped_storage()) for t in forward()]
    gc.collect()
    return [not storage.expired() for storage in tensors]


def test_a_forward_pass_without_a_backward_pass_leaks_nothing():
    """As when a loss is only evaluated, or a step is skipped."""
    conv, (x, weight, bias, residual) = nn.Conv2d(8, 8, 1), inputs(requires_grad=True)

    def forward():
        with recompute_activations():
            y = conv(x)
            z = group_norm_act(y, weight, bias, 4, 1e-5, residual, relu=True)
            return y, z, F.relu_(conv(z))

    assert not any(alive_after(forward))


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this PyTorch does not tell whether there are hooks",
)
def test_inside_a_checkpoint():
    """Only the input of the checkpoint is saved, and the gradients are the same."""
    convs = [nn.Conv2d(8, 8, 1) for _ in range(3)]
    x, weight, bias, _ = inputs((2, 8, 16, 16), requires_grad=True)

    def forward(y):
        with recompute_activations():
            for conv in convs:
                y = group_norm_act(conv(y), weight, bias, 4, relu=True)
            return y

    def loss():
        return checkpoint(forward, x, use_reentrant=False).square().sum()

    result = x.numel() * 4
    assert saved_bytes(loss) == pytest.approx(result, rel=0.05)
    actual = torch.autograd.grad(loss(), [weight, x])
    assert_close(actual, torch.autograd.grad(forward(x).square().sum(), [weight, x]))


def test_vectors_of_any_stride():
    x, weight, bias, _ = inputs()
    wide = torch.stack([weight, bias], 1)
    expected = F.group_norm(x, 4, weight, bias)
    assert_close(group_norm_act(x, wide[:, 0], wide[:, 1], 4), expected)


def test_tensors_modified_in_place_are_saved():
    """Recomputing the unmodified tensor would silently give wrong gradients."""
    conv = nn.Conv2d(8, 8, 1)
    x, weight, bias, _ = inputs(requires_grad=True)
    actual = []
    for enabled in (False, True):
        with recompute_activations(enabled):
            y = group_norm_act(x, weight, bias, 4)
            y += 1
            loss = conv(y).square().sum()
        actual.append(torch.autograd.grad(loss, [conv.weight, x]))
    assert_close(actual[0], actual[1], rtol=0, atol=0)


def test_compiled_as_one_graph_for_any_size():
    """No graph break, no recompilation for another size, and the same gradients."""
    torch._dynamo.reset()
    conv = nn.Conv2d(8, 8, 3)
    _, weight, bias, _ = inputs(requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")

    def act(x):
        return group_norm_act(conv(x), weight, bias, 4, relu=True).square().sum()

    compiled = torch.compile(act, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for side in (20, 24, 31):
        x = torch.randn(2, 8, side, side + 3)
        actual, expected = (
            torch.autograd.grad(f(x), [weight, bias, conv.weight]) for f in (compiled, act)
        )
        assert_close(actual, expected)
        counts.append(counter.frame_count)
    # PyTorch 2.14 compiles the first time twice, as it decides to treat epsilon as a constant
    assert counts == counts[:1] * 3


def test_the_operators_are_in_the_compiled_graph():
    """Forward and backward; exported graphs have PyTorch's operators instead."""
    torch._dynamo.reset()
    graphs = []

    def keep(module, _):
        graphs.append(str(module.graph))
        return module

    x, weight, bias, residual = inputs(requires_grad=True)

    def act(x, residual):
        return group_norm_act(x, weight, bias, 4, 1e-5, residual, relu=True)

    compiled = torch.compile(act, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(x, residual).sum().backward()
    forward, backward = graphs
    assert "gn_det.group_norm_act" in forward and "gn_det.group_norm_act_backward" in backward
    # PyTorch 2.6 does not tell that it exports
    for strict in (False, True) if hasattr(torch.compiler, "_is_exporting_flag") else ():
        exported = torch.export.export(GroupNormAct(8, 4), (x.detach(),), strict=strict)
        code = str(exported.graph)
        assert "group_norm" in code and "gn_det" not in code


@pytest.mark.parametrize("change", ["input", "output", "filter"])
def test_saved_tensors_must_not_change(change):
    """As without the context, where autograd notices it."""
    conv = nn.Conv2d(8, 8, 1)
    for enabled in (False, True):
        x, weight, bias, _ = inputs(requires_grad=True)
        y = x * 1
        with recompute_activations(enabled):
            z = group_norm_act(y, weight, bias, 4, relu=True)
            loss = conv(z).square().sum()
        with torch.no_grad():
            {"input": y, "output": z, "filter": conv.weight}[change].add_(1)
        if change == "output" and enabled:
            # The convolution's input is recomputed, so a change of it does no harm
            torch.autograd.grad(loss, [conv.weight, x])
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, [conv.weight, x])


@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (3, 8, 2, 2), (1, 8, 7, 1), (0, 8, 5, 6)])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_channels_last(shape, groups):
    """The same derivatives as in float64 and NCHW, and the format is kept."""
    x, weight, bias, residual = inputs(shape, torch.float64)
    wanted = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    F.relu(F.group_norm(wanted[0], groups, *wanted[1:3]) + wanted[3]).square().sum().backward()
    given = [t.float().requires_grad_() for t in (x, weight, bias, residual)]
    image, r = (given[i].to(memory_format=torch.channels_last) for i in (0, 3))
    y = group_norm_act(image, given[1], given[2], groups, 1e-5, r, relu=True)
    assert not y.numel() or y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    for one, two in zip(given, wanted, strict=True):
        assert_close(one.grad.double(), two.grad, rtol=2e-4, atol=2e-4)


def test_operators_pass_opcheck():
    x, weight, bias, residual = inputs()
    ops = torch.ops.gn_det
    y, mean, rstd = ops.group_norm_act(x, weight, bias, residual, 4, 1e-5, True)
    constants = (4, 1e-5, True)
    for operator, arguments in (
        (ops.group_norm_act, (x, weight, bias, residual, *constants)),
        (ops.group_norm_act, (x, weight, bias, None, *constants)),
        (ops.group_norm_act_backward, (x, x, y, weight, bias, mean, rstd, *constants)),
        (ops.group_norm_act_backward, (x, x, None, weight, bias, mean, rstd, *constants)),
        (ops.group_norm_act_recompute, (x, weight, bias, mean, rstd, *constants)),
        (ops.frozen_bn_act, (x, weight, bias, bias, weight.abs(), residual, 1e-5, True)),
        (ops.frozen_bn_act_backward, (x, y, weight, weight.abs(), 1e-5, True)),
        (ops.frozen_bn_act_backward, (x, y, weight, weight.abs(), 1e-5, False)),
    ):
        library.opcheck(operator.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "8 channels .* 3 groups"),
        ({"num_groups": 0}, "8 channels .* 0 groups"),
        ({"weight": torch.ones(4)}, r"weight .*\(4,\).*\(8,\)"),
        ({"bias": torch.ones(8, 1)}, r"bias .*\(8, 1\).*\(8,\)"),
        ({"residual": torch.ones(2, 8, 1, 1)}, r"residual .*\(2, 8, 1, 1\).*\(2, 8, 5, 6\)"),
    ],
)
def test_invalid_arguments(change, message):
    x, weight, bias, residual = inputs()
    arguments = {"weight": weight, "bias": bias, "num_groups": 4, "residual": residual}
    with pytest.raises(ValueError, match=message):
        group_norm_act(x, **(arguments | change))
