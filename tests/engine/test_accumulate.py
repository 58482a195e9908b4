"""Accumulated gradients of Mask R-CNN equal those of the undivided batch."""

import gc
import json
import weakref

import pytest
import torch
from conftest import SCRATCH, TINY, command, shapes_config
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from gn_det.engine.accumulate import accumulate_gradients
from gn_det.engine.trainer import Trainer

# All anchors and proposals are used, so that sampling is not random
ALL = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 100_000, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.IMS_PER_BATCH", 4),
)
C4 = (
    *("MODEL.BACKBONE.NAME", "build_gn_resnet_backbone", "MODEL.ROI_HEADS.NAME", "GNRes5ROIHeads"),
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32),
    *("MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32,64]]"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 0, "MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", ""),
    *("MODEL.ROI_MASK_HEAD.NORM", ""),
)


def double(cfg) -> nn.Module:
    """The model in float64, except for NMS, which Detectron2 supports in float32 only."""
    torch.manual_seed(0)
    model = build_model(cfg).double().train()
    rpn = model.proposal_generator
    predict = rpn.predict_proposals

    def in_float32(anchors, logits, deltas, sizes):
        return predict(anchors, [x.float() for x in logits], [x.float() for x in deltas], sizes)

    rpn.predict_proposals = in_float32
    return model


@pytest.fixture(scope="module")
def batch(shapes) -> list[dict]:
    """Four images of different sizes and with different numbers of objects."""
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *ALL, "INPUT.MIN_SIZE_TRAIN", "(64,96,128)")
    for records in Trainer.build_train_loader(cfg):
        sizes = {tuple(r["image"].shape) for r in records}
        objects = {len(r["instances"]) for r in records}
        if len(sizes) > 1 and len(objects) > 1:
            return records


def gradients(model: nn.Module, batch: list[dict]) -> tuple[dict, dict]:
    """The losses and the gradients."""
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, grads


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("opts", [(), C4, ("MODEL.FPN.NORM", "")], ids=["FPN", "C4", "plain FPN"])
def test_equals_the_undivided_batch(parts, opts, batch):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *ALL, *opts)
    losses, expected = gradients(double(cfg), batch)
    model = double(cfg)
    accumulate_gradients(model, parts)
    found_losses, found = gradients(model, batch)
    assert list(found_losses) == list(losses) and set(found) == set(expected)
    for name in losses:
        assert_close(found_losses[name], losses[name], rtol=1e-5, atol=1e-9, msg=name)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale + 1e-12, msg=name)


def test_parts_without_objects_have_no_weight(batch):
    """The mask loss is an average over foreground RoIs; a part without any must not change it."""
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *ALL)
    empty = [{**r, "instances": r["instances"][:0]} for r in batch[:2]]
    for records in ([*empty, *batch[2:]], empty * 2):
        losses, expected = gradients(double(cfg), records)
        model = double(cfg)
        accumulate_gradients(model, 2)
        found_losses, found = gradients(model, records)
        assert_close(found_losses, losses, rtol=1e-5, atol=1e-9, check_dtype=False)
        name = "roi_heads.box_head.fc1.weight"
        assert_close(found[name], expected[name], rtol=1e-4, atol=1e-9)


def test_memory_of_one_part(batch):
    """Activations of one part are freed before those of the next are computed."""
    alive, most, runs = [], 0, 0

    def count(module, inputs, output):
        nonlocal most, runs
        gc.collect()
        others = [ref for ref in alive if ref() is not None]
        most, runs = max(most, len(others)), runs + 1
        alive[:] = [*others, weakref.ref(output)]

    model = build_model(shapes_config("mask_rcnn_R_18_FPN_gn", *ALL)).train()
    model.backbone.bottom_up.stem.conv1.register_forward_hook(count)
    gradients(model, batch)
    assert (most, runs) == (0, 1)
    accumulate_gradients(model, 4)
    gradients(model, batch)
    assert runs == 1 + 4 * 2, "each part runs once in forward and once in backward"
    assert most <= 1, "those of the previous part, when the next starts"


def test_autocast_applies_to_recomputation(batch):
    """Otherwise the gradients would not be those of the losses."""
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *ALL)

    def run(parts: int) -> tuple[dict, dict]:
        torch.manual_seed(0)
        model = build_model(cfg).train()
        if parts:
            accumulate_gradients(model, parts)
        seen = set()
        fc = model.roi_heads.box_head.fc1
        fc.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        with EventStorage(), torch.autocast("cpu", torch.bfloat16):
            losses = model(batch)
        # As a GradScaler does
        (1024 * sum(losses.values())).backward()
        assert seen == {torch.bfloat16}
        return losses, {n: p.grad / 1024 for n, p in model.named_parameters() if p.grad is not None}

    losses, expected = run(0)
    found_losses, found = run(1)
    for name in losses:
        assert_close(found_losses[name], losses[name], rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_recomputation_samples_the_same_rois(batch):
    """Detectron2 samples RoIs at random, but backward must use those of the losses."""
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8)
    model = build_model(cfg).train()
    accumulate_gradients(model, 4)
    seen: list[torch.Tensor] = []
    head = model.roi_heads.box_head
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    gradients(model, batch)
    forward, backward = seen[:4], seen[4:]
    for one, two in zip(forward, reversed(backward), strict=True):
        assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_inference_and_names_do_not_change(batch):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn")
    torch.manual_seed(0)
    plain = build_model(cfg).eval()
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    accumulate_gradients(model, 2)
    assert list(model.state_dict()) == list(plain.state_dict()) and type(model) is type(plain)
    with torch.no_grad():
        for one, two in zip(model(batch), plain(batch), strict=True):
            assert torch.equal(one["instances"].scores, two["instances"].scores)


def test_train_net_resumes_with_accumulation(tmp_path):
    """Two iterations, then two more, with clipped gradients."""
    config = "configs/Shapes/mask_rcnn_R_18_FPN_gn.yaml"
    keys = [*TINY, *SCRATCH, "SOLVER.ACCUMULATE_ITERS", 2, "TEST.EVAL_PERIOD", 0]
    keys += ["SOLVER.STEPS", "()", "OUTPUT_DIR", tmp_path, "SOLVER.CLIP_GRADIENTS.ENABLED", True]
    for iterations in (2, 4):
        done = command(
            *("tools/train_net.py", "--config-file", config, "--resume"),
            *(*keys, "SOLVER.MAX_ITER", iterations),
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert "Starting training from iteration 2" in (tmp_path / "log.txt").read_text()
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert last["iteration"] == 4 and "bbox/AP" in last
