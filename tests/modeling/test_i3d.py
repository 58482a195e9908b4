"""I3D: a still clip gives the image's results, and a clip those of a public I3D."""

import re

import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torch.testing import assert_close

from gn_det.checkpoint.checkpointer import StrictCheckpointer
from gn_det.config_file import read_config
from gn_det.errors import InputError

CLIPS = "Shapes/clips_R_18_gn.yaml"
R50 = ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256")


def config(*opts: str, images: bool = False):
    name = ["MODEL.BACKBONE.NAME", "build_gn_resnet_backbone"] if images else []
    return read_config(CLIPS, ["MODEL.DEVICE", "cpu", *opts, *name])


def randomized(model: nn.Module) -> nn.Module:
    """With norms as after training."""
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.mark.parametrize("depth", [(), R50], ids=["R18", "R50"])
@pytest.mark.parametrize("strides", ["(1,1)", "(2,2)"])
@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.RESNETS.NORM", "GN"),
        ("MODEL.RESNETS.NORM", "GN", "MODEL.GROUP_NORM.IMPL", "native"),
        ("MODEL.RESNETS.NORM", "FrozenBN"),
        ("MODEL.RESNETS.NORM", "BN"),
    ],
    ids=lambda opts: "-".join(opts[1::2]),
)
def test_a_still_clip_gives_the_logits_of_the_image(tmp_path, depth, strides, opts):
    """Of the 2-D checkpoint that it is inflated from, through MODEL.WEIGHTS."""
    torch.manual_seed(0)
    flat = randomized(build_model(config(*opts, *depth, images=True))).eval()
    torch.save({"model": flat.state_dict()}, tmp_path / "flat.pth")
    clips = build_model(config(*opts, *depth, "MODEL.I3D.STEM_STRIDES", strides)).eval()
    StrictCheckpointer(clips, complete=True).load(str(tmp_path / "flat.pth"), [])
    image = torch.randint(256, (2, 3, 64, 64)).float()
    with torch.no_grad():
        expected = flat.logits(image)
        found = clips.logits(image[:, :, None].expand(-1, -1, 8, -1, -1))
    scale = expected.abs().max()
    assert scale > 1e-3
    assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["fused", "native"])
def test_group_norm_over_time_height_and_width(impl):
    model = build_model(config("MODEL.GROUP_NORM.IMPL", impl)).double()
    conv = randomized(model).backbone.res2[0].conv1
    x = torch.randn(2, 64, 4, 6, 5, dtype=torch.float64)
    y = F.conv3d(x, conv.weight, padding=1)
    assert conv.weight.shape[2] == 3
    y = y.view(2, 32, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y.view(2, 64, 4, 6, 5) * conv.norm.weight.view(-1, 1, 1, 1)
    y = (y + conv.norm.bias.view(-1, 1, 1, 1)).relu()
    assert_close(conv(x).relu(), y)


def test_gradients_of_fused_norms():
    """Equal to those of PyTorch's."""
    images, gradients = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64), []
    for impl in ("fused", "native"):
        torch.manual_seed(0)
        model = build_model(config("MODEL.GROUP_NORM.IMPL", impl)).double()
        model.logits(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(*gradients)


def test_strides_and_kernels_of_the_baseline():
    """32 frames become 4, and the kernels cover 5 and 3 frames, as in the non-local baseline."""
    backbone = build_backbone(
        config(*R50, "MODEL.I3D.STEM_STRIDES", "(2,2)"), ShapeSpec(channels=3)
    )
    assert backbone(torch.randn(1, 3, 32, 64, 64))["res5"].shape == (1, 2048, 4, 2, 2)
    covered = {n: m.weight.shape[2] for n, m in backbone.named_modules() if hasattr(m, "norm")}
    covered = {n: frames for n, frames in covered.items() if frames > 1}
    blocks = [(2, 0), (2, 1), (2, 2), (3, 0), (3, 2), (4, 0), (4, 2), (4, 4), (5, 1)]
    expected = {f"res{stage}.{block}.conv1": 3 for stage, block in blocks}
    assert covered == {"stem.conv1": 5, **expected}


def from_pytorchvideo(name: str) -> str:
    """The name in Detectron2's ResNet of a tensor of pytorchvideo's."""
    stage = {"0": "stem", "1": "res2", "3": "res3", "4": "res4", "5": "res5"}
    name = re.sub(r"^blocks\.(\d)\.", lambda m: f"{stage[m[1]]}.", name)
    name = name.replace("stem.conv.", "stem.conv1.").replace("stem.norm.", "stem.conv1.norm.")
    name = re.sub(r"res_blocks\.(\d+)\.", r"\1.", name)
    name = name.replace("branch1_conv.", "shortcut.").replace("branch1_norm.", "shortcut.norm.")
    places = {"a": 1, "b": 2, "c": 3}
    name = re.sub(r"branch2\.conv_(\w)\.", lambda m: f"conv{places[m[1]]}.", name)
    return re.sub(r"branch2\.norm_(\w)\.", lambda m: f"conv{places[m[1]]}.norm.", name)


def test_equals_pytorchvideos_i3d():
    resnet = pytest.importorskip("pytorchvideo.models.hub.resnet", reason="needs pytorchvideo")
    torch.manual_seed(0)
    public = resnet.i3d_r50(pretrained=False).eval()
    for module in public.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    own = build_backbone(config(*R50, "MODEL.RESNETS.NORM", "BN"), ShapeSpec(channels=3)).eval()
    tensors = {n: t for n, t in public.state_dict().items() if not n.startswith("blocks.6.")}
    own.load_state_dict({from_pytorchvideo(name): t for name, t in tensors.items()})
    clip = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        x = clip
        for block in public.blocks[:6]:
            x = block(x)
        assert_close(own(clip)["res5"], x, rtol=1e-4, atol=1e-5)


def test_a_detectors_checkpointer_loads_what_was_trained(tmp_path):
    model = build_model(config())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    other = build_model(config())
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


DEFORMED = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False,False,False,True]")


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.RESNETS.NORM", "WN"),
        ("MODEL.RESNETS.WEIGHT_STANDARDIZATION", "True"),
        (*DEFORMED, *R50),
    ],
)
def test_what_cannot_be_inflated_is_refused(opts):
    with pytest.raises(InputError) as error:
        build_model(config(*opts))
    assert error.value.key == opts[0]
