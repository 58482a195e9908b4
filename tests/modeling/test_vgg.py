"""VGG against torchvision's, with each norm."""

import pytest
import torch
import torch.nn.functional as F
from conftest import shapes_config
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch.testing import assert_close

from gn_det.checkpoint.calibrate import calibrate, measured_moments
from gn_det.checkpoint.convert import backbone_config, build_network
from gn_det.errors import InputError
from gn_det.modeling import implement

FPN = "mask_rcnn_VGG_11_FPN_gn"
SMALL = ("MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.VGG.DEPTH", "16", "MODEL.VGG.WIDTH", "32")


def backbone(*opts: str, norm: str = "GN"):
    torch.manual_seed(0)
    name = ("MODEL.BACKBONE.NAME", "build_gn_vgg_backbone", "MODEL.VGG.NORM", norm)
    return build_backbone(shapes_config(FPN, *SMALL, *name, *opts))


@pytest.mark.parametrize("impl", ["fused", "native"])
@pytest.mark.parametrize(
    ("opts", "groups"),
    [((), lambda c: 32), (("MODEL.GROUP_NORM.DIM_PER_GP", "8"), lambda c: c // 8)],
)
def test_the_norm_follows_each_convolution(impl, opts, groups):
    """Convolution without bias, norm, ReLU; features before the pooling, in float64."""
    vgg = backbone(*opts, "MODEL.GROUP_NORM.IMPL", impl).double()
    for parameter in vgg.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = vgg.state_dict()
    assert len(weights) == 13 * 3
    x = image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    outputs = vgg(image)
    for stage, count in enumerate((2, 2, 3, 3, 3), start=1):
        for place in range(1, count + 1):
            name = f"conv{stage}_{place}"
            x = F.conv2d(x, weights[f"{name}.weight"], padding=1)
            gamma, beta = (weights[f"{name}.norm.{v}"] for v in ("weight", "bias"))
            x = F.relu(F.group_norm(x, groups(x.shape[1]), gamma, beta))
        if stage > 2:
            assert_close(outputs[f"conv{stage}"], x)
            assert vgg.output_shape()[f"conv{stage}"].stride == 2 ** (stage - 1)
            assert vgg.output_shape()[f"conv{stage}"].channels == x.shape[1]
        x = F.max_pool2d(x, 2)
    assert_close(outputs["pool5"], x)


@pytest.mark.parametrize("recompute", ["none", "norm", "conv3", "block"])
def test_gradients_are_those_of_native_norms(recompute):
    image = torch.randn(1, 3, 64, 64)
    gradients = []
    for opts in (("IMPL", "native"), ("RECOMPUTE", recompute)):
        vgg = backbone(f"MODEL.GROUP_NORM.{opts[0]}", opts[1]).double()
        sum(y.square().mean() for y in vgg(image.double()).values()).backward()
        gradients.append({name: p.grad for name, p in vgg.named_parameters()})
    assert_close(gradients[1], gradients[0])


def test_frozen_stages():
    """As Fast R-CNN freezes the first two stages; BatchNorm becomes FrozenBN in them."""
    vgg = backbone("MODEL.BACKBONE.FREEZE_AT", "2", norm="BN")
    trained = {name.partition(".")[0] for name, p in vgg.named_parameters() if p.requires_grad}
    assert trained == {f"conv{stage}_{place}" for stage in (3, 4, 5) for place in (1, 2, 3)}
    frozen = [n for n, m in vgg.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    assert frozen == [f"conv{s}_{p}.norm" for s in (1, 2) for p in (1, 2)]


def test_fpn_has_the_strides_of_a_resnets():
    shapes = build_backbone(shapes_config(FPN)).output_shape()
    assert {name: s.stride for name, s in shapes.items()} == {f"p{i}": 2**i for i in range(2, 7)}


def test_without_a_norm_there_are_biases():
    vgg = backbone(norm="")
    assert {n.partition(".")[2] for n in vgg.state_dict()} == {"weight", "bias"}
    assert implement(vgg) is vgg


@torch.no_grad()
def test_calibrated_from_batch_norm():
    """Each channel after a GN has the mean and standard deviation that it has after the BN."""
    torch.manual_seed(0)
    images, moments = torch.randn(16, 3, 64, 64), []
    facts = {"MODEL.VGG.DEPTH": 11, "MODEL.VGG.WIDTH": 32, "MODEL.VGG.NORM": "BN"}
    cfg = backbone_config(facts)
    bn = build_backbone(cfg, ShapeSpec(channels=3))
    bn(images)
    weights = bn.eval().state_dict()
    gn = build_network(backbone_config(facts | {"MODEL.VGG.NORM": "GN"}), weights)
    calibrate(gn, bn, images, measured_moments(bn, images))
    for network in (bn, gn):
        moments.append(measured_moments(network, images))
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) == 8
    for name, wanted in moments[0].items():
        assert_close(moments[1][name], wanted, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("opts", "key"),
    [
        (("MODEL.VGG.DEPTH", "15"), "MODEL.VGG.DEPTH"),
        (("MODEL.VGG.OUT_FEATURES", "('res5',)"), "MODEL.VGG.OUT_FEATURES"),
        (("MODEL.GROUP_NORM.NUM_GROUPS", "24"), "backbone.conv1_1"),
    ],
)
def test_mistakes_name_the_key_or_layer(opts, key):
    with pytest.raises(InputError, match=key):
        backbone(*opts)
