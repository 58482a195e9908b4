"""Fused models compared with Detectron2's blocks: same results, gradients, names; less memory."""

import multiprocessing
from collections import Counter

import pytest
import torch
from conftest import shapes_config
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.roi_heads import build_box_head, build_mask_head
from detectron2.utils.events import EventStorage
from modeling.test_backbone import C4
from studies.saved_bytes import saved_bytes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gn_det.modeling import implement

R50 = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
MODELS = {"R-18 FPN": (), "R-50 FPN": R50, "R-50 C4": C4}
NATIVE = ("MODEL.GROUP_NORM.IMPL", "native")
UNFROZEN = ("MODEL.BACKBONE.FREEZE_AT", 0)
NORMS = {"GN": "mask_rcnn_R_18_FPN_gn", "FrozenBN": "mask_rcnn_R_18_FPN_frozenbn"}


def randomize_norms(module: nn.Module) -> None:
    """Set affine parameters and statistics to random values, as after training."""
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm | FrozenBatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.3)
            nn.init.normal_(layer.bias, 0.0, 0.3)
        if isinstance(layer, FrozenBatchNorm2d):
            nn.init.normal_(layer.running_mean, 0.0, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)


def pair(build, *opts, name: str = NORMS["GN"]) -> tuple[nn.Module, nn.Module]:
    """Two modules from `build`, fused and native, with the same values."""
    fused, native = (build(shapes_config(name, *opts, *more)) for more in ((), NATIVE))
    randomize_norms(native)
    fused.load_state_dict(native.state_dict())
    assert list(fused.state_dict()) == list(native.state_dict())
    return fused, native


def backbone(cfg) -> nn.Module:
    return build_backbone(cfg)


def leaves(output) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters and of the input, for a fixed random weighting of the outputs."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(1)
    # The same weighting for outputs of any dtype
    mixture = [
        (y * torch.randn(y.shape, dtype=torch.float64).to(y)).sum() for y in leaves(module(x))
    ]
    sum(mixture).backward()
    trained = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return {"input": x.grad, **trained}


def compare(fused: nn.Module, native: nn.Module, x: Tensor) -> None:
    """Compare outputs in float32, and gradients in float64, where rounding flips no ReLU."""
    for one, two in zip(leaves(fused(x)), leaves(native(x)), strict=True):
        assert_close(one, two, rtol=1e-5, atol=1e-5 * two.abs().max().item())
    actual, expected = (gradients(m.double(), x.double()) for m in (fused, native))
    assert list(actual) == list(expected)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert_close(actual[name], gradient, rtol=1e-9, atol=1e-9 * scale, msg=name)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", MODELS)
def test_backbones(model, norm):
    torch.manual_seed(0)
    opts = (*MODELS[model], *UNFROZEN, "MODEL.RESNETS.NORM", norm)
    fused, native = pair(backbone, *opts, name=NORMS[norm])
    compare(fused, native, torch.randn(2, 3, 96, 160))


@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("channels_last", [False, True])
def test_heads(channels_last, count):
    """Box head and mask head; a batch may have no RoIs."""
    torch.manual_seed(0)
    opts = ("MODEL.CHANNELS_LAST", channels_last, "MODEL.ROI_BOX_HEAD.NUM_FC", 0)
    box = lambda cfg: build_box_head(cfg, ShapeSpec(channels=64, height=7, width=7))  # noqa: E731
    fused, native = pair(box, *opts)
    compare(fused, native, torch.randn(count, 64, 7, 7)) if count else fused(
        torch.zeros(0, 64, 7, 7)
    )
    mask = lambda cfg: build_mask_head(cfg, ShapeSpec(channels=64, height=14, width=14))  # noqa: E731
    fused, native = pair(mask, *opts)
    fused.forward, native.forward = fused.layers, native.layers
    x = torch.randn(count, 64, 14, 14)
    if count:
        compare(fused, native, x)
    else:
        assert not any(p.any() for p in gradients(fused, x).values())


def test_a_native_head_in_torchscript():
    box = lambda cfg: build_box_head(cfg, ShapeSpec(channels=64, height=7, width=7))  # noqa: E731
    _, native = pair(box)
    x = torch.randn(3, 64, 7, 7)
    assert_close(torch.jit.script(native)(x), native(x), rtol=0, atol=0)


def test_res5_of_c4():
    torch.manual_seed(0)
    build = lambda cfg: build_model(cfg).roi_heads.res5  # noqa: E731
    compare(*pair(build, *C4), torch.randn(3, 1024, 14, 14))


def batch() -> list[dict]:
    cfg = shapes_config(NORMS["GN"])
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[])
    return [mapper(dict(record)) for record in DatasetCatalog.get("shapes_train")[:2]]


class OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", MODELS)
def test_every_norm_of_a_model_is_fused(model):
    """PyTorch's group norm never runs, and its ReLU runs only after layers without a norm."""
    trained = build_model(shapes_config(NORMS["GN"], *MODELS[model], *UNFROZEN))
    images = batch()
    with EventStorage(), OperatorCounter() as operators:
        trained(images)
    norms = sum(isinstance(m, nn.GroupNorm) for m in trained.modules())
    assert operators.counts["group_norm_act"] == norms
    assert not operators.counts["native_group_norm"]
    # RPN and deconvolution; with FPN also a fully connected layer, and the RPN on 4 more levels
    num_relus = sum(v for k, v in operators.counts.items() if k in ("relu", "relu_"))
    assert num_relus == (2 if model == "R-50 C4" else 3 + 4)


LEVELS = ("none", "norm", "conv3", "block")


@pytest.mark.parametrize("model", MODELS)
def test_recomputation_gives_the_same_bits(model):
    torch.manual_seed(0)
    opts = (*MODELS[model], *UNFROZEN)
    models = [
        backbone(shapes_config(NORMS["GN"], *opts, "MODEL.GROUP_NORM.RECOMPUTE", level))
        for level in LEVELS
    ]
    randomize_norms(models[0])
    x = torch.randn(2, 3, 64, 96)
    expected = gradients(models[0], x)
    kept = []
    for trained in models:
        trained.load_state_dict(models[0].state_dict())
        for name, gradient in gradients(trained, x).items():
            assert torch.equal(gradient, expected[name]), name
        kept.append(saved_bytes(lambda t=trained: sum(y.sum() for y in leaves(t(x)))))
    assert kept == sorted(kept, reverse=True) and kept[3] < 0.5 * kept[0] and kept[1] < kept[0]


def test_recomputation_in_heads():
    torch.manual_seed(0)
    shape = ShapeSpec(channels=64, height=7, width=7)
    heads = [
        build_box_head(shapes_config(NORMS["GN"], "MODEL.GROUP_NORM.RECOMPUTE", level), shape)
        for level in ("none", "norm")
    ]
    heads[1].load_state_dict(heads[0].state_dict())
    x = torch.randn(40, 64, 7, 7)
    one, two = (gradients(head, x) for head in heads)
    assert all(torch.equal(one[name], two[name]) for name in one)
    kept = [saved_bytes(lambda h=head: h(x).sum()) for head in heads]
    # The outputs of the 4 ReLUs are not saved, nor is the flattened one for the linear layer
    assert kept[0] - kept[1] == pytest.approx(4 * x.numel() * 4, rel=0.01)


@pytest.mark.parametrize("level", ["conv3", "block"])
def test_bytes_saved_by_an_fpn(level):
    """The outputs of its 1x1 convolutions, at strides 4 to 32, are not saved."""
    x, own = torch.randn(1, 3, 64, 96), []
    for setting in ("none", level):
        keys = ("MODEL.GROUP_NORM.RECOMPUTE", setting)
        fpn = backbone(shapes_config(NORMS["GN"], *UNFROZEN, *keys))
        trunk = saved_bytes(lambda f=fpn: sum(y.sum() for y in f.bottom_up(x).values()))
        own.append(saved_bytes(lambda f=fpn: sum(y.sum() for y in f(x).values())) - trunk)
    positions = sum(64 // s * 96 // s for s in (4, 8, 16, 32))
    assert own[0] - own[1] >= 0.9 * 64 * positions * 4


# Bytes that a bottleneck block saves in float32, per element of its first convolution's output
BOTTLENECK = {"none": 48, "norm": 40, "conv3": 24, "block": 16}


@pytest.mark.parametrize("level", LEVELS)
def test_bytes_saved_by_a_bottleneck(level):
    cfg = shapes_config(NORMS["GN"], *R50, *UNFROZEN, "MODEL.GROUP_NORM.RECOMPUTE", level)
    blocks = backbone(cfg).bottom_up.res4[1:]
    x = torch.randn(1, 1024, 12, 14, requires_grad=True)
    many, fewer = (saved_bytes(lambda c=count: blocks[:c](x).sum()) for count in (4, 2))
    assert (many - fewer) / 2 / (256 * 12 * 14) == pytest.approx(BOTTLENECK[level], rel=0.02)
    frozen = shapes_config(NORMS["FrozenBN"], *R50, *UNFROZEN)
    blocks = backbone(frozen).bottom_up.res4[1:]
    many, fewer = (saved_bytes(lambda c=count: blocks[:c](x).sum()) for count in (4, 2))
    assert (many - fewer) / 2 / (256 * 12 * 14) == pytest.approx(24, rel=0.02)


def test_outputs_are_channels_last():
    torch.manual_seed(0)
    opts = (*R50, *UNFROZEN)
    contiguous = backbone(shapes_config(NORMS["GN"], *opts))
    last = backbone(shapes_config(NORMS["GN"], *opts, "MODEL.CHANNELS_LAST", True))
    last.load_state_dict(contiguous.state_dict())
    x = torch.randn(2, 3, 64, 96)
    for name, y in last(x).items():
        assert y.is_contiguous(memory_format=torch.channels_last), name
    compare(last, contiguous, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_on_a_gpu(norm, channels_last):
    """A backbone with Triton kernels, in float32 and bfloat16, compared with PyTorch's."""
    torch.manual_seed(0)
    opts = (*UNFROZEN, "MODEL.DEVICE", "cuda", "MODEL.CHANNELS_LAST", channels_last)
    fused, native = (m.cuda() for m in pair(backbone, *R50, *opts, name=NORMS[norm]))
    x = torch.randn(2, 3, 192, 256, device="cuda")
    torch.backends.cudnn.allow_tf32 = False
    for one, two in zip(leaves(fused(x)), leaves(native(x)), strict=True):
        assert_close(one, two, rtol=1e-4, atol=1e-4 * two.abs().max().item())
    actual, expected = gradients(fused, x), gradients(native, x)
    with torch.autocast("cuda", torch.bfloat16):
        half = gradients(fused, x)
    for name, gradient in expected.items():
        for other, least in ((actual[name], 0.9999), (half[name], 0.8)):
            cosine = torch.cosine_similarity(other.flatten(), gradient.flatten(), dim=0)
            assert cosine > least, name


def test_an_already_built_model():
    """As with Detectron2's LazyConfigs, which call `implement` on a built model."""
    model = build_model(shapes_config(NORMS["GN"], *NATIVE, *UNFROZEN))
    x = torch.randn(1, 3, 64, 64)
    expected = model.backbone(x)["p2"]
    implement(model)
    with OperatorCounter() as operators:
        actual = model.backbone(x)["p2"]
    assert_close(actual, expected)
    assert not operators.counts["native_group_norm"] and not operators.counts["relu_"]


def test_a_trace_runs_without_gn_det(tmp_path):
    """A traced model, as from Detectron2's export tools, has only PyTorch's own operators."""
    torch.manual_seed(0)
    for name in NORMS.values():
        model = build_backbone(shapes_config(name)).eval().requires_grad_(False)
        randomize_norms(model)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            traced = torch.jit.trace(lambda x, m=model: m(x)["p2"], x)
            assert "gn_det::" not in str(traced.inlined_graph)
            assert_close(traced(x), model(x)["p2"])


def test_scaled_gradients():
    """With a GradScaler and half precision, gradients are close to those in float32."""
    torch.manual_seed(0)
    model = backbone(shapes_config(NORMS["GN"], *UNFROZEN))
    x = torch.randn(2, 3, 64, 64)
    expected = gradients(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = leaves(model(x))
    mixture = sum((y.float() * torch.randn(y.shape, dtype=torch.float64)).sum() for y in outputs)
    scaler.scale(mixture).backward()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        cosine = torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.9, name


def train_on_half(rank: int, path: str, results) -> None:
    """One of two processes, each with half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = backbone(shapes_config(NORMS["GN"], *UNFROZEN)).double()
    x = torch.randn(2, 3, 64, 64).double()
    parallel = DistributedDataParallel(model)
    sum(y.square().mean() for y in parallel(x[rank : rank + 1]).values()).backward()
    if rank == 0:
        results.put({n: p.grad.numpy() for n, p in model.named_parameters()})
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """GN needs no communication: gradients equal those of the same batch in one process."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=train_on_half, args=(rank, str(tmp_path / "store"), results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    actual = results.get()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    torch.manual_seed(0)
    model = backbone(shapes_config(NORMS["GN"], *UNFROZEN)).double()
    x = torch.randn(2, 3, 64, 64).double()
    sum(y.square().mean() for y in model(x).values()).backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        one, two = torch.from_numpy(actual[name]), parameter.grad
        assert_close(one, two, rtol=1e-9, atol=1e-9 * scale, msg=name)
