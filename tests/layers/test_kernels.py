"""The Triton kernels against formulas in float64; without a GPU, in Triton's interpreter."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gn_det.layers import (
    dispatch,
    frozen_bn_act,
    group_norm_act,
    recompute_activations,
    self_test,
)

pytest.importorskip("triton")
from gn_det.layers.kernels import frozen_bn, launch, split, tile, whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# (N, C, H, W) and groups: odd sizes, a RoI, one position, one group, one channel per group, and a
# number of channels per group that is not a power of two
SHAPES = {
    "odd": ((2, 8, 5, 7), 4),
    "roi": ((3, 16, 7, 7), 2),
    "position": ((2, 8, 1, 1), 2),
    "layer norm": ((2, 12, 3, 9), 1),
    "instance norm": ((1, 4, 13, 5), 4),
    "not a power": ((1, 6, 9, 3), 2),
}


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", DEVICE == "cpu")


@pytest.fixture(params=["split", "whole"])
def kernels(request, monkeypatch) -> Iterator[str]:
    """Force either kind of kernel at any size, with small tiles, so that there are several."""
    monkeypatch.setattr(whole, "LARGEST_TILE", 0 if request.param == "split" else 1 << 20)
    monkeypatch.setattr(tile, "TILE", 32)
    monkeypatch.setattr(tile, "CHANNELS", 4)
    monkeypatch.setattr(split, "PROGRAMS", 20)
    # Groups of few channels are combined in the last kernel, others in one of their own
    monkeypatch.setattr(split, "FOLDED", 6)
    forget_plans()
    yield request.param
    forget_plans()


def forget_plans() -> None:
    """They depend on the sizes of tiles."""
    for function in (split._plan, split._normalization, whole._plan, whole.fits, frozen_bn._plan):
        function.cache_clear()


def make(shape, dtype, layout, mean=0.0) -> Tensor:
    x = (torch.randn(shape) * 2 + mean).to(DEVICE, dtype)
    return x.to(memory_format=LAYOUTS[layout])


def run(function, dy: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Output and gradients, in that order."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def formula(groups, eps, relu):
    """Wu and He's Equations 1 to 7."""

    def norm(x, weight, bias, residual):
        grouped = x.reshape(len(x), groups, -1)
        mean = grouped.mean(2, keepdim=True)
        variance = (grouped - mean).square().mean(2, keepdim=True)
        y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
        y = y * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        y = y if residual is None else y + residual
        return y.clamp(min=0) if relu else y

    return norm


def double(*tensors):
    return [t if t is None else t.double() for t in tensors]


def compare(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, two in zip(actual, expected, strict=True):
        scale = two.abs().max().clamp(min=1e-2)
        assert_close(one.double() / scale, two / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "relu", "residual"),
    [
        *(("odd", relu, residual) for relu in (False, True) for residual in (False, True)),
        *((shape, True, True) for shape in SHAPES if shape != "odd"),
    ],
)
def test_group_norm(shape, layout, relu, residual, kernels):
    """Both kinds of kernel in each dtype, on inputs whose mean is 15 standard deviations from 0."""
    torch.manual_seed(0)
    size, groups = SHAPES[shape]
    for dtype in TOLERANCE if shape == "odd" else [torch.float32]:
        x = make(size, dtype, layout, mean=30.0 if size[2] > 1 else 0.0)
        dy = make(size, dtype, layout)
        weight, bias = torch.randn(2, size[1], device=DEVICE)
        inputs = x, weight, bias, make(size, dtype, layout) if residual else None
        actual = run(lambda x, w, b, r: group_norm_act(x, w, b, groups, 1e-5, r, relu), dy, *inputs)
        expected = run(formula(groups, 1e-5, relu), dy.double(), *double(*inputs))
        compare(actual, expected, dtype)
        for image in (actual[0], actual[1]):
            assert image.dtype == dtype and image.stride() == x.stride()
        assert actual[2].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_weight_and_bias_over_many_chunks(layout, kernels, monkeypatch):
    """Six images of four chunks and more, where a tile adds up sixteen."""
    monkeypatch.setattr(split, "PROGRAMS", 1000)
    forget_plans()
    torch.manual_seed(0)
    x, dy = (make((6, 4, 16, 8), torch.float32, layout) for _ in range(2))
    weight, bias = torch.randn(2, 4, device=DEVICE)
    actual = run(lambda x, w, b: group_norm_act(x, w, b, 2), dy, x, weight, bias)
    expected = run(
        lambda x, w, b: formula(2, 1e-5, False)(x, w, b, None),
        dy.double(),
        *double(x, weight, bias),
    )
    compare(actual, expected, torch.float32)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes too long in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size", [(2, 64, 400, 672), (2, 256, 200, 336), (2, 2048, 25, 42), (256, 256, 14, 14)]
)
def test_sizes_of_a_detector(size, layout, dtype):
    """The tiles and grids that training uses: stem, res2 and p2, res5, and the mask head."""
    torch.manual_seed(0)
    x, dy, residual = (make(size, dtype, layout) for _ in range(3))
    weight, bias = torch.randn(2, size[1], device=DEVICE)
    for inputs in ((x, weight, bias, residual), (x, weight, bias, None)):
        actual = run(lambda x, w, b, r: group_norm_act(x, w, b, 32, 1e-5, r, True), dy, *inputs)
        expected = run(formula(32, 1e-5, True), dy.double(), *double(*inputs))
        # A rounding error decides whether the ReLU passes the gradient of a value next to 0
        y, exact = actual.pop(0), expected.pop(0)
        compare([y], [exact], dtype)
        for one, two in zip(actual, expected, strict=True):
            error = (one.double() - two).norm() / two.norm()
            assert error < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_bn(layout, relu, residual):
    torch.manual_seed(0)
    size = (2, 6, 5, 7)
    vectors = [*torch.randn(3, 6, device=DEVICE), torch.rand(6, device=DEVICE)]

    def act(vectors):
        return lambda x, r: frozen_bn_act(x, *vectors, 1e-5, r, relu)

    def formula(x, r):
        weight, bias, mean, variance = (v.double().view(-1, 1, 1) for v in vectors)
        y = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
        y = y if r is None else y + r
        return y.clamp(min=0) if relu else y

    for dtype in TOLERANCE:
        x, dy = make(size, dtype, layout), make(size, dtype, layout)
        inputs = x, make(size, dtype, layout) if residual else None
        actual = run(act(vectors), dy, *inputs)
        compare(actual, run(formula, dy.double(), *double(*inputs)), dtype)
        assert actual[0].dtype == actual[1].dtype == dtype and actual[1].stride() == x.stride()


def test_gradients_with_recomputation(kernels, monkeypatch):
    """They equal those without recomputation to the bit."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)).to(DEVICE)
    weight, bias = (nn.Parameter(t) for t in torch.randn(2, 8, device=DEVICE))
    x = make((2, 8, 6, 7), torch.float32, "NCHW")

    def gradients(enabled: bool) -> list[Tensor]:
        with recompute_activations(enabled):
            y = x
            for conv in convs:
                y = group_norm_act(conv(y), weight, bias, 2, relu=True)
        parameters = [weight, bias, *convs.parameters()]
        return list(torch.autograd.grad(y.square().sum(), parameters))

    for one, two in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, two)


def test_repeated_runs_give_the_same_bits(kernels):
    torch.manual_seed(0)
    x, dy = (make((2, 8, 9, 9), torch.float32, "channels_last") for _ in range(2))
    weight, bias = torch.randn(2, 8, device=DEVICE)

    def once():
        return run(lambda x, w, b: group_norm_act(x, w, b, 4, relu=True), dy, x, weight, bias)

    for one, two in zip(once(), once(), strict=True):
        assert torch.equal(one, two)


def test_relu_passes_nan(kernels):
    """As PyTorch's ReLU does, so that divergence shows in losses and in gradients."""
    x = make((1, 8, 3, 5), torch.float32, "NCHW")
    x[0, 0, 0, 0] = torch.nan
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    act = lambda x, w, b: group_norm_act(x, w, b, 4, relu=True)  # noqa: E731
    actual = run(act, torch.ones_like(x), x, weight, bias)
    assert actual[0][0, :2].isnan().all() and not actual[0][0, 2:].isnan().any()
    assert actual[1][0, :2].isnan().all() and actual[2][:2].isnan().all()
    frozen = lambda x: frozen_bn_act(x, weight, bias, bias, weight, relu=True)  # noqa: E731
    assert frozen(x)[0, 0, 0, 0].isnan()


def test_strided_vectors():
    x = make((1, 4, 3, 5), torch.float32, "NCHW")
    wide = torch.randn(8, 2, device=DEVICE)
    weight, bias = wide[:4, 0], wide[::2, 1]
    vectors = weight, bias, bias, weight.abs()
    compare(
        [group_norm_act(x, weight, bias, 2), frozen_bn_act(x, *vectors)],
        [
            formula(2, 1e-5, False)(*double(x, weight, bias), None),
            F.batch_norm(x, bias, weight.abs(), weight, bias).double(),
        ],
        torch.float32,
    )


def test_inputs_of_different_layouts(kernels):
    """A gradient with stride 0, and a residual in another memory format and dtype."""
    torch.manual_seed(0)
    x = make((2, 8, 5, 3), torch.bfloat16, "channels_last")
    weight, bias = torch.randn(2, 8, device=DEVICE)
    inputs = x, weight, bias, make(x.shape, torch.float32, "NCHW")
    dy = torch.ones(1, device=DEVICE).expand_as(x)
    actual = run(lambda x, w, b, r: group_norm_act(x, w, b, 4, 1e-5, r, True), dy, *inputs)
    expected = run(formula(4, 1e-5, True), dy.double(), *double(*inputs))
    compare(actual, expected, torch.bfloat16)
    assert actual[4].dtype == torch.float32 and actual[4].is_contiguous()


def test_inputs_without_a_kernel():
    x = make((2, 8, 4, 6), torch.float32, "NCHW")
    assert dispatch.has_kernel(x) and dispatch.has_kernel(x.to(memory_format=torch.channels_last))
    for other in (x.double(), x[:, ::2], x[:0], x[0], x.transpose(2, 3)):
        assert not dispatch.has_kernel(other)


def test_the_kernels_pass_their_own_test(caplog):
    caplog.set_level("INFO", "gn_det.layers")
    assert self_test.kernels_work(torch.device(DEVICE))
    assert DEVICE in caplog.text


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        *((m, n, "slightly wrong") for m in (whole, frozen_bn) for n in ("forward", "backward")),
        *((split, "forward", "NaN"), (split, "backward", "not built")),
    ],
)
def test_kernels_that_fail_are_not_used(module, name, fault, monkeypatch, caplog):
    """One warning, which names the kernel, or says what Triton lacks."""
    right = getattr(module, name)

    def wrong(*arguments):
        if fault == "not built":
            raise RuntimeError("Failed to find C compiler")
        results = right(*arguments)
        first = results[0] if isinstance(results, tuple) else results
        first.view(-1)[5] = float("nan") if fault == "NaN" else first.view(-1)[5] + 0.1
        return results

    monkeypatch.setattr(module, name, wrong)
    monkeypatch.setattr(self_test, "LAYOUTS", (torch.contiguous_format,))
    assert not self_test.kernels_work(torch.device(DEVICE))
    (record,) = caplog.records
    named = "frozen_bn" if module is frozen_bn else module.__name__.rpartition(".")[2]
    assert ("C compiler" if fault == "not built" else named) in record.getMessage()


class CompiledStandIn:
    """Records its launches, as Triton's launcher takes them."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list = []

    def run(self, *arguments) -> None:
        self.launches.append(arguments)


class KernelStandIn:
    """Like a function decorated with `triton.jit`; each launch through it compiles."""

    arg_names = ("X", "SIZE", "WIDE", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[CompiledStandIn] = []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **constants):
            self.compiled.append(CompiledStandIn())
            return self.compiled[-1]

        return compile_and_run


def test_later_launches_go_to_the_compiled_kernel(monkeypatch):
    """With constants in the kernel's order; one kernel serves all grids, but not other types."""
    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "CompiledKernel", CompiledStandIn)
    monkeypatch.setattr(launch, "_DIRECT", True)
    kernel, x = KernelStandIn(), torch.zeros(2)
    fixed = f"stream of {x.get_device()}", "function", "metadata", None, None, None
    first = launch.Launch(kernel, (1, 1, 1), torch.float32, BLOCK=8, WIDE=True)
    for size in (3, 4, 5):
        first(x, size)
    (compiled,) = kernel.compiled
    assert compiled.launches == [(1, 1, 1, *fixed, x.data_ptr(), n, True, 8) for n in (4, 5)]
    launch.Launch(kernel, (2, 1, 1), torch.float32, BLOCK=8, WIDE=True)(x, 6)
    assert compiled.launches[-1] == (2, 1, 1, *fixed, x.data_ptr(), 6, True, 8)
    for types, block, warps in ((torch.bfloat16, 8, 4), (torch.float32, 4, 4), (None, 8, 2)):
        launch.Launch(kernel, (1, 1, 1), types, warps, BLOCK=block, WIDE=True)(x, 7)
    assert len(kernel.compiled) == 4
