"""RetinaNet and semantic segmentation: their heads follow `NORM` keys and the grouping."""

import pytest
import torch
from conftest import SCRATCH, shapes_config
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close

from gn_det import check_config
from gn_det.check import ConfigError
from gn_det.errors import InputError

RETINANET = (
    *("MODEL.META_ARCHITECTURE", "GNRetinaNet", "MODEL.RETINANET.NORM", "GN"),
    *("MODEL.BACKBONE.NAME", "build_gn_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res3','res4','res5']"),
    *("MODEL.FPN.IN_FEATURES", "['res3','res4','res5']", "MODEL.RETINANET.NUM_CLASSES", 6),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32],[64],[128],[256]]", "MODEL.MASK_ON", False),
    *SCRATCH,
)
PANOPTIC = (
    *("MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.NAME", "GNSemSegFPNHead"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 64, *SCRATCH),
)


def build(*opts: object) -> nn.Module:
    torch.manual_seed(7)
    return build_model(shapes_config("mask_rcnn_R_18_FPN_gn", *opts)).eval()


def groups(module: nn.Module) -> set[int]:
    return {layer.num_groups for layer in module.modules() if isinstance(layer, nn.GroupNorm)}


def test_panoptic_fpn_equals_stock():
    ours, stock = build(*PANOPTIC), build(*PANOPTIC, "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead")
    assert list(ours.state_dict()) == list(stock.state_dict())
    features = ours.backbone(torch.rand(1, 3, 64, 96))
    expected = stock.sem_seg_head(features)[0]
    assert_close(ours.sem_seg_head(features)[0], expected, rtol=1e-5, atol=1e-5)


def test_retinanet_equals_its_formula():
    """Detectron2 0.6 itself cannot build RetinaNet with GN."""
    ours = build(*RETINANET)
    feature = torch.rand(2, 64, 8, 8)
    wide = feature.double()
    for layer in ours.head.cls_subnet:
        if isinstance(layer, nn.Conv2d):
            wide = nn.functional.conv2d(wide, layer.weight.double(), layer.bias.double(), padding=1)
        elif isinstance(layer, nn.GroupNorm):
            wide = nn.functional.group_norm(wide, 32, layer.weight.double(), layer.bias.double())
        else:
            wide = wide.relu()
    expected = nn.functional.conv2d(
        wide, ours.head.cls_score.weight.double(), ours.head.cls_score.bias.double(), padding=1
    )
    assert len([m for m in ours.head.cls_subnet if isinstance(m, nn.GroupNorm)]) == 4
    logits, _ = ours.head([feature] * 5)
    assert_close(logits[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "opts, part", [(RETINANET, "head"), (PANOPTIC, "sem_seg_head")], ids=["retinanet", "panoptic"]
)
def test_heads_follow_the_grouping(opts, part):
    assert groups(getattr(build(*opts, "MODEL.GROUP_NORM.HEADS_DIM_PER_GP", 4), part)) == {16}


@pytest.mark.parametrize(
    "opts, layer",
    [
        ((*RETINANET, "MODEL.FPN.NORM", "", "MODEL.GROUP_NORM.HEADS_DIM_PER_GP", 5), "head.cls"),
        ((*PANOPTIC, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 48), "sem_seg_head.p2"),
    ],
)
def test_groups_that_do_not_divide(opts, layer):
    with pytest.raises(InputError, match=layer):
        build(*opts)


@pytest.mark.parametrize(
    "opts, key",
    [
        ((*RETINANET, "MODEL.META_ARCHITECTURE", "RetinaNet"), "MODEL.META_ARCHITECTURE"),
        (
            (*RETINANET, "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
            "MODEL.BACKBONE.NAME",
        ),
        ((*PANOPTIC, "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"), "MODEL.SEM_SEG_HEAD.NAME"),
        ((*RETINANET, "MODEL.RETINANET.NUM_CLASSES", 3), "MODEL.RETINANET.NUM_CLASSES"),
        ((*RETINANET, "SOLVER.ACCUMULATE_ITERS", 2), "SOLVER.ACCUMULATE_ITERS"),
        ((*PANOPTIC, "SOLVER.ACCUMULATE_ITERS", 2), "SOLVER.ACCUMULATE_ITERS"),
    ],
)
def test_refused(opts, key):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *opts, "MODEL.GROUP_NORM.DIM_PER_GP", 2)
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    # Detectron2 0.6 cannot build its own RetinaNet with GN, which is a problem as well
    assert {problem.key for problem in error.value.problems} == {key}


@pytest.mark.parametrize("opts", [RETINANET, PANOPTIC], ids=["retinanet", "panoptic"])
def test_accepted(opts):
    check_config(shapes_config("mask_rcnn_R_18_FPN_gn", *opts, "MODEL.GROUP_NORM.DIM_PER_GP", 2))
