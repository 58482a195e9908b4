"""Backbones and heads compared with Detectron2's own: names, tensors, outputs."""

from collections import Counter

import pytest
import torch
from conftest import shapes_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close

from gn_det.errors import InputError

STOCK = (
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
)
STOCK_FPN = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", *STOCK)
C4 = (
    *("MODEL.BACKBONE.NAME", "build_gn_resnet_backbone", "MODEL.ROI_HEADS.NAME", "GNRes5ROIHeads"),
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
    *("MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32,64]]"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 0),
)
STOCK_C4 = (
    *C4,
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
    *STOCK,
)
NORMS = ("FrozenBN", "BN", "SyncBN", "GN")


def build(*opts: object, name: str = "mask_rcnn_R_18_FPN_gn") -> nn.Module:
    torch.manual_seed(7)
    return build_model(shapes_config(name, *opts)).eval()


def norm_everywhere(norm: str) -> tuple[str, ...]:
    parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    return tuple(word for part in parts for word in (f"MODEL.{part}.NORM", norm))


def same_tensors(ours: nn.Module, stock: nn.Module) -> None:
    ours_state, stock_state = ours.state_dict(), stock.state_dict()
    assert list(ours_state) == list(stock_state)
    for name, tensor in stock_state.items():
        assert_close(ours_state[name], tensor, rtol=0, atol=0, msg=name)
    frozen = [p.requires_grad for p in ours.parameters()]
    assert frozen == [p.requires_grad for p in stock.parameters()]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_fpn_equals_stock(norm, freeze_at):
    opts = (*norm_everywhere(norm), "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    ours, stock = build(*opts), build(*opts, *STOCK_FPN)
    same_tensors(ours, stock)
    image = torch.rand(1, 3, 96, 64)
    for level, expected in stock.backbone(image).items():
        assert_close(ours.backbone(image)[level], expected, rtol=0, atol=0)
    rois = torch.rand(5, 64, 7, 7)
    assert_close(ours.roi_heads.box_head(rois), stock.roi_heads.box_head(rois), rtol=0, atol=0)
    masks = ours.roi_heads.mask_head.layers(rois)
    assert masks.shape == (5, 6, 14, 14)
    assert_close(masks, stock.roi_heads.mask_head.layers(rois), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_c4_equals_stock(norm):
    ours = build(*C4, "MODEL.RESNETS.NORM", norm)
    stock = build(*STOCK_C4, "MODEL.RESNETS.NORM", norm)
    same_tensors(ours, stock)
    features = torch.rand(2, 1024, 14, 14)
    expected = stock.roi_heads.res5(features)
    assert_close(ours.roi_heads.res5(features), expected, rtol=0, atol=0)


def test_convs_are_those_of_the_baseline():
    """With the same seed, BN* and GN models differ only in their norm layers."""
    gn, frozen = build("MODEL.FPN.NORM", ""), build(name="mask_rcnn_R_18_FPN_frozenbn")
    for name, tensor in frozen.backbone.state_dict().items():
        if "norm" not in name:
            assert_close(gn.backbone.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_where_the_norms_are():
    """Norms follow 20 convs of ResNet-18, 8 of the FPN, 4 per head; none in RPN and predictors."""
    model = build()
    parts = Counter(
        ".".join(name.split(".")[:2]).partition(".fpn")[0]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.GroupNorm)
    )
    assert parts == {
        "backbone.bottom_up": 20,
        "backbone": 8,
        "roi_heads.box_head": 4,
        "roi_heads.mask_head": 4,
    }
    res5 = build(*C4).roi_heads.res5
    assert sum(isinstance(layer, nn.GroupNorm) for layer in res5.modules()) == 10


@pytest.mark.parametrize(
    ("norm", "opts", "groups_of_64"),
    [
        ("GN", (), 32),
        ("GN", ("MODEL.GROUP_NORM.NUM_GROUPS", 8), 8),
        ("GN", ("MODEL.GROUP_NORM.DIM_PER_GP", 16), 4),
        ("LN", ("MODEL.GROUP_NORM.NUM_GROUPS", 8), 1),
        ("IN", (), 64),
    ],
)
def test_groups_reach_every_layer(norm, opts, groups_of_64):
    fpn = build(*norm_everywhere(norm), *opts, "MODEL.GROUP_NORM.EPSILON", 1e-3)
    c4 = build(*C4, "MODEL.RESNETS.NORM", norm, *opts, "MODEL.GROUP_NORM.EPSILON", 1e-3)
    layers = [m for model in (fpn, c4) for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(layers) == 36 + 53
    assert {m.num_groups for m in layers if m.num_channels == 64} == {groups_of_64}
    assert {m.eps for m in layers} == {1e-3}


def test_layer_norm_at_each_position():
    """Detectron2's LayerNorm, which its main branch calls LN, against its formula in float64."""
    fpn, c4 = build(*norm_everywhere("LN2d")), build(*C4, "MODEL.RESNETS.NORM", "LN2d")
    for model, count in ((fpn, 36), (c4, 53)):
        layers = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        assert len(layers) == count
        assert not any(isinstance(m, nn.GroupNorm | nn.BatchNorm2d) for m in model.modules())
    norm = fpn.backbone.fpn_output2.norm
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 64, 5, 7)
    y = x.double()
    mean, variance = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
    weight, bias = (p.detach().double().view(-1, 1, 1) for p in (norm.weight, norm.bias))
    expected = (y - mean) / (variance + 1e-6).sqrt() * weight + bias
    assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_heads_num_groups_applies_outside_the_resnet():
    """C4's res5 belongs to the ResNet, because its weights are pretrained with it."""
    opts = ("MODEL.GROUP_NORM.DIM_PER_GP", 16, "MODEL.GROUP_NORM.HEADS_NUM_GROUPS", 8)
    fpn, c4 = build(*norm_everywhere("GN"), *opts), build(*C4, *opts)
    resnets = [fpn.backbone.bottom_up, c4.backbone, c4.roi_heads.res5]
    inside = {id(m): m for resnet in resnets for m in resnet.modules()}
    layers = [m for model in (fpn, c4) for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert all(m.num_groups * 16 == m.num_channels for m in layers if id(m) in inside)
    assert [m.num_groups for m in layers if id(m) not in inside] == 16 * [8]
    fpn = build(*norm_everywhere("GN"), *opts, "MODEL.GROUP_NORM.HEADS_DIM_PER_GP", 4)
    inside = {id(m) for m in fpn.backbone.bottom_up.modules()}
    outside = [m for m in fpn.modules() if isinstance(m, nn.GroupNorm) and id(m) not in inside]
    assert {m.num_channels // m.num_groups for m in outside} == {4}


def test_backbone_and_fpn_norms_are_independent():
    """Table 5 needs BN* with GN elsewhere; GN in the FPN must not replace the ResNet's BN."""
    for norm, kind in (("FrozenBN", FrozenBatchNorm2d), ("BN", nn.BatchNorm2d)):
        backbone = build("MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0).backbone
        assert sum(isinstance(m, kind) for m in backbone.bottom_up.modules()) == 20
        assert sum(isinstance(m, nn.GroupNorm) for m in backbone.modules()) == 8
    backbone = build("MODEL.FPN.NORM", "BN").backbone
    assert sum(isinstance(m, nn.GroupNorm) for m in backbone.bottom_up.modules()) == 20
    assert sum(isinstance(m, nn.BatchNorm2d) for m in backbone.modules()) == 8


def test_frozen_stages():
    """FREEZE_AT 2 freezes stem and res2, and turns their BN into BN*."""
    gn, bn = build().backbone.bottom_up, build(name="mask_rcnn_R_18_FPN_bn").backbone.bottom_up
    for resnet in (gn, bn):
        for name, parameter in resnet.named_parameters():
            assert parameter.requires_grad != name.startswith(("stem", "res2")), name
    assert isinstance(bn.stem.conv1.norm, FrozenBatchNorm2d)
    assert isinstance(bn.res3[0].conv1.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("training", [False, True])
def test_results_do_not_depend_on_other_images(training):
    """This is the purpose of GN. The BN model in training shows that the test can fail."""
    torch.manual_seed(0)
    image, others = torch.rand(1, 3, 64, 64), torch.rand(3, 3, 64, 64) * 9

    def difference(name: str) -> float:
        backbone = build(name=name).backbone.train(training)
        alone, batched = backbone(image), backbone(torch.cat([image, others]))
        return max((alone[p] - batched[p][:1]).abs().max().item() for p in alone)

    assert difference("mask_rcnn_R_18_FPN_gn") < 1e-4
    if training:
        assert difference("mask_rcnn_R_18_FPN_bn") > 1e-2


@pytest.mark.parametrize(
    ("parts", "layer"),
    [
        (("RESNETS", "FPN"), "backbone.bottom_up.stem.conv1: 64 "),
        (("FPN", "ROI_BOX_HEAD"), "backbone.fpn_lateral2: 64 "),
        (("ROI_BOX_HEAD",), "roi_heads.box_head.conv1 .*: 64 "),
        (("ROI_MASK_HEAD",), "roi_heads.mask_head.mask_fcn1 .*: 64 "),
    ],
)
def test_groups_that_do_not_divide_name_the_layer(parts, layer):
    norms = [word for part in parts for word in (f"MODEL.{part}.NORM", "GN")]
    with pytest.raises(InputError, match=rf"{layer}.*use 16 or 32.*MODEL.GROUP_NORM.NUM_GROUPS"):
        build(*norm_everywhere(""), *norms, "MODEL.GROUP_NORM.NUM_GROUPS", 24)


def test_published_gn_checkpoints_load(tmp_path):
    """A checkpoint of a stock Detectron2 GN model provides every tensor of ours, by name."""
    stock = build(*STOCK_FPN)
    DetectionCheckpointer(stock, save_dir=str(tmp_path)).save("stock")
    torch.manual_seed(8)
    ours = build_model(shapes_config("mask_rcnn_R_18_FPN_gn"))
    DetectionCheckpointer(ours).load(str(tmp_path / "stock.pth"))
    same_tensors(ours, stock)
