"""The relative step of each part, and the warning of a mask head that would not learn."""

import pytest
import torch
from conftest import shapes_config
from torch import nn

import gn_det.engine.relative_steps as module
from gn_det.engine.relative_steps import describe_steps, relative_steps


class Head(nn.Module):
    """A box predictor and a mask head of one layer each, with known gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.roi_heads = nn.ModuleDict(
            {
                "mask_head": nn.ModuleDict({"mask_fcn1": nn.Conv2d(1, 2, 1)}),
                "box_predictor": nn.ModuleDict({"cls_score": nn.Linear(2, 1)}),
            }
        )
        nn.init.constant_(self.roi_heads["mask_head"]["mask_fcn1"].weight, 3.0)
        nn.init.constant_(self.roi_heads["box_predictor"]["cls_score"].weight, 2.0)

    def forward(self, batch: list[float]) -> dict[str, torch.Tensor]:
        scale = float(sum(batch))
        mask = self.roi_heads["mask_head"]["mask_fcn1"].weight
        box = self.roi_heads["box_predictor"]["cls_score"].weight
        return {"loss_mask": scale * mask.sum(), "loss_cls": (box**2).sum()}


@pytest.mark.parametrize("clip", [None, 1.0])
def test_formula(clip, monkeypatch):
    """Rate x gradient / weight, and the sum over a schedule with warm-up and one step."""
    monkeypatch.setattr(module, "_build", lambda cfg: Head())
    # A third image is left out
    monkeypatch.setattr(module, "build_train_loader", lambda cfg: [[2.0, 3.0, 100.0]])
    keys = {
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MASK_HEAD_MULTIPLIER": 4.0,
        "SOLVER.MOMENTUM": 0.9,
        "SOLVER.MAX_ITER": 100,
        "SOLVER.STEPS": "(50,)",
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CLIP_GRADIENTS.ENABLED": clip is not None,
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": clip or 1.0,
    }
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *(w for pair in keys.items() for w in pair))
    steps = relative_steps(cfg)
    # Two equal values in each tensor, so their norms have the same factor sqrt(2)
    gradient = min(5.0, clip / 2**0.5) if clip else 5.0
    mask = 0.04 * gradient / 3.0
    box = 0.01 * (min(4.0, clip / 2**0.5) if clip else 4.0) / 2.0
    assert steps["mask head"].step == pytest.approx(mask, rel=1e-5)
    assert steps["box predictor"].step == pytest.approx(box, rel=1e-5)
    # 50 iterations at the full rate, 50 at a tenth, and 1 / (1 - 0.9)
    assert steps["mask head"].moved == pytest.approx(mask * 55 * 10, rel=1e-3)


NARROW = ("SOLVER.BASE_LR", 0.005, "SOLVER.MAX_ITER", 200, "SOLVER.STEPS", "()")
NARROW += ("SOLVER.WARMUP_ITERS", 50, "INPUT.MIN_SIZE_TRAIN", "(96,)")


def warnings(name: str, *opts: object) -> list[str]:
    keys = (*NARROW, "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "GN", *opts)
    lines = describe_steps(shapes_config(name, *keys)).splitlines()
    return [line for line in lines if "WARNING" in line]


def test_a_narrow_mask_head_at_a_small_rate():
    """64 channels in 32 groups, at 0.005 over 200 iterations: masks are not learned."""
    (line,) = warnings("mask_rcnn_R_18_FPN_gn", "SOLVER.MASK_HEAD_MULTIPLIER", 1.0)
    assert "mask head" in line and "SOLVER.MASK_HEAD_MULTIPLIER" in line
    assert not warnings("mask_rcnn_R_18_FPN_gn", "SOLVER.MASK_HEAD_MULTIPLIER", 0.0)
    assert not warnings("mask_rcnn_R_18_FPN_frozenbn", "SOLVER.MASK_HEAD_MULTIPLIER", 1.0)


def test_not_measured_without_the_training_set():
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", "DATASETS.TRAIN", "('coco_2017_train',)")
    assert "coco_2017_train" in describe_steps(cfg)
