"""Weight decay and learning rates of norm parameters and of the backbone."""

import logging

import pytest
from conftest import ROOT, shapes_config
from torch import nn

from gn_det.config_file import read_config
from gn_det.engine.trainer import Trainer
from gn_det.modeling import build_gn_resnet_fpn_backbone  # noqa: F401
from gn_det.solver import mask_head_factor

STOCK = ("SOLVER.MASK_HEAD_MULTIPLIER", 1.0)
CASES = {
    "defaults": (),
    "biases decayed": ("SOLVER.WEIGHT_DECAY_BIAS", 0.01),
    "Detectron's biases": ("SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0),
    "small rate of norms": ("SOLVER.NORM_LR_FACTOR", 0.1, "SOLVER.BIAS_LR_FACTOR", 2.0),
    "small rate of the backbone": ("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.NORM_LR_FACTOR", 0.5),
    "mask head as the rest": ("SOLVER.MASK_HEAD_MULTIPLIER", 1.0),
    "clipped": ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.WEIGHT_DECAY_BIAS", 0.01),
}


@pytest.mark.parametrize("opts", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["mask_rcnn_R_18_FPN_gn", "mask_rcnn_R_18_FPN_bn"])
def test_weight_decay(opts, name):
    cfg = shapes_config(name, *opts)
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(groups) == len(trained)
    norms = 0
    resnet = set(model.backbone.bottom_up.modules())
    mask_head = set(model.roi_heads.mask_head.modules())
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_norm = isinstance(module, (nn.GroupNorm, nn.BatchNorm2d))
            norms += is_norm
            decay = cfg.SOLVER.WEIGHT_DECAY
            if is_norm:
                decay = 0.0
            elif key == "bias" and cfg.SOLVER.WEIGHT_DECAY_BIAS is not None:
                decay = cfg.SOLVER.WEIGHT_DECAY_BIAS
            factor = cfg.SOLVER.BIAS_LR_FACTOR if key == "bias" else 1.0
            factor *= cfg.SOLVER.NORM_LR_FACTOR if is_norm else 1.0
            factor *= cfg.SOLVER.BACKBONE_MULTIPLIER if module in resnet else 1.0
            factor *= cfg.SOLVER.MASK_HEAD_MULTIPLIER if module in mask_head else 1.0
            group = groups[id(parameter)]
            assert group["weight_decay"] == decay, (module, key)
            assert group["lr"] == pytest.approx(cfg.SOLVER.BASE_LR * factor), (module, key)
            assert group["momentum"] == cfg.SOLVER.MOMENTUM
    assert norms > 0


def test_backbone_multiplier_includes_res5_of_c4_models():
    """res5 is pretrained too, but belongs to the RoI heads."""
    factors = ("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.MASK_HEAD_MULTIPLIER", 1.0)
    cfg = shapes_config("mask_rcnn_R_50_C4_gn", *factors)
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    slow = {id(p) for part in (model.backbone, model.roi_heads.res5) for p in part.parameters()}
    for parameter, rate in rates.items():
        factor = 0.1 if parameter in slow else 1.0
        assert rate == pytest.approx(cfg.SOLVER.BASE_LR * factor)
    assert slow & rates.keys() and rates.keys() - slow


def test_weight_decay_norm_is_used():
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", "SOLVER.WEIGHT_DECAY_NORM", 0.5)
    optimizer = Trainer.build_optimizer(cfg, Trainer.build_model(cfg))
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.5, cfg.SOLVER.WEIGHT_DECAY}


def test_the_schedule_keeps_norm_lr_factor():
    """Warm-up and steps change both rates by the same factor."""
    factors = ("SOLVER.NORM_LR_FACTOR", 0.1, "SOLVER.MASK_HEAD_MULTIPLIER", 1.0)
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *factors)
    optimizer = Trainer.build_optimizer(cfg, Trainer.build_model(cfg))
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates = sorted(group["lr"] for group in optimizer.param_groups)
        assert rates[0] == pytest.approx(0.1 * rates[1])
        optimizer.step()
        scheduler.step()
    assert rates[1] == pytest.approx(0.0002)


def test_each_parameter_group_is_logged(caplog):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn")
    model = Trainer.build_model(cfg)
    with caplog.at_level(logging.INFO, logger="gn_det"):
        optimizer = Trainer.build_optimizer(cfg, model)
    lines = [r.getMessage() for r in caplog.records if r.name == "gn_det.solver"]
    assert len(lines) == len(optimizer.param_groups) == 4
    # 36 norms minus 5 in the frozen stem and res2, each with gamma and beta
    assert "54 norm tensors, learning rate 0.02, weight decay 0" in " ".join(lines)
    assert "8 norm tensors, learning rate 0.08, weight decay 0" in " ".join(lines)


COCO = sorted((ROOT / "configs" / "COCO-InstanceSegmentation").glob("*.yaml"))


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_published_recipes_keep_the_rate_of_the_mask_head(path):
    assert mask_head_factor(read_config(str(path))) == 1.0


@pytest.mark.parametrize(
    ("channels", "rate", "iterations", "expected"),
    [
        (64, 0.02, 90000, 4.0),  # 256 / 64
        (256, 0.02, 100, 1.0),  # never above 0.02, if the base rate is not
        (256, 0.005, 100, 4.0),  # 0.02 / 0.005
        (256, 0.0025, 2000, 2.0),  # 10 / 2000 = 0.005
        (128, 0.0025, 2000, 4.0),
        (256, 0.0025, 100000, 1.0),
        (512, 0.0025, 100000, 1.0),
    ],
)
def test_factor_of_the_mask_head(channels, rate, iterations, expected):
    """It depends on the head's width, the rate and the length, and only for a head with a norm."""
    keys = {"MAX_ITER": iterations, "BASE_LR": rate, "MASK_HEAD_MULTIPLIER": 0.0}
    opts = [word for key, value in keys.items() for word in (f"SOLVER.{key}", value)]
    opts += ["MODEL.ROI_MASK_HEAD.CONV_DIM", channels]
    assert mask_head_factor(shapes_config("mask_rcnn_R_18_FPN_gn", *opts)) == expected
    assert mask_head_factor(shapes_config("mask_rcnn_R_18_FPN_bn", *opts)) == 1.0
    assert mask_head_factor(shapes_config("mask_rcnn_R_18_FPN_gn", *opts, *STOCK)) == 1.0


@pytest.mark.parametrize(("name", "decay"), [("clips_R_18_gn", 0.0), ("pretrain_R_18_gn", 1e-4)])
def test_weight_decay_of_norms_in_classifiers(name, decay):
    """None for clips, as in the non-local baseline, and that of all weights for images."""
    cfg = read_config(f"Shapes/{name}.yaml", ["MODEL.DEVICE", "cpu"])
    model = Trainer.build_model(cfg)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    wanted = {id(p) for norm in norms for p in norm.parameters()}
    groups = Trainer.build_optimizer(cfg, model).param_groups
    found = {g["weight_decay"] for g in groups for p in g["params"] if id(p) in wanted}
    assert found == {decay}
