"""Pretraining: learns, and hands a backbone over that Detectron2 loads whole."""

import json

import pytest
import torch
from conftest import TINY, command, shapes_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch.testing import assert_close

from gn_det.engine.pretrain import batches, load_crops


@pytest.fixture(scope="module", params=["bn", "gn"])
def pretrained(request, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param)
    config = f"configs/Shapes/pretrain_R_18_{request.param}.yaml"
    keys = ("SOLVER.MAX_ITER", 100, "SOLVER.STEPS", "(80,)", "SOLVER.IMS_PER_BATCH", 16)
    seen = ("DATASETS.TEST", "('shapes_train',)")
    size = (
        "INPUT.MIN_SIZE_TRAIN",
        "(32,)",
        "SOLVER.WARMUP_ITERS",
        5,
        "SOLVER.BASE_LR",
        0.02,
        "OUTPUT_DIR",
        output,
    )
    done = command("tools/pretrain.py", "--config-file", config, *TINY, *keys, *size, *seen)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, output


def test_it_learns(pretrained):
    _, output = pretrained
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert lines[-1]["top1"] > 2 * 100 / 6, "on the crops that it has seen"


def test_handed_over_whole(pretrained):
    """Every tensor of the detector's trunk comes from the file, and each from its own name."""
    norm, output = pretrained
    weights = output / "backbone.pth"
    file = torch.load(weights, weights_only=True)
    name = {"bn": "mask_rcnn_R_18_FPN_frozenbn", "gn": "mask_rcnn_R_18_FPN_gn"}[norm]
    model = build_model(shapes_config(name))
    DetectionCheckpointer(model).load(str(weights))
    trunk = model.backbone.bottom_up.state_dict()
    for key, tensor in trunk.items():
        assert_close(tensor, file["model"][key], rtol=0, atol=0, msg=key)
    left_over = set(file["model"]) - set(trunk)
    assert all(key.endswith("num_batches_tracked") for key in left_over)
    if norm == "bn":
        assert any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
        assert not torch.equal(trunk["res3.0.conv1.norm.running_mean"], torch.zeros(128))


def test_gamma_and_beta_are_decayed(pretrained):
    """As in the paper's ImageNet training (Section 4.1), unlike in detection."""
    _, output = pretrained
    log = (output / "log.txt").read_text()
    assert "norm tensors, learning rate 0.02, weight decay 0.0001" in log


def test_crops_hold_their_objects(shapes):
    crops, labels = load_crops("shapes_train", 40, "BGR")
    annotations = json.loads((shapes / "instances_train.json").read_text())["annotations"]
    objects = [a for a in annotations if not a["iscrowd"]]
    assert crops.shape == (len(objects), 3, 40, 40) and crops.dtype == torch.uint8
    # register order is the file's, image by image
    assert sorted(labels.tolist()) == sorted(a["category_id"] - 1 for a in objects)
    window, names = next(batches(crops, labels, size=4, side=32))
    assert window.shape == (4, 3, 32, 32) and names.shape == (4,)


def test_fewer_crops_than_a_batch(tmp_path):
    config = "configs/Shapes/pretrain_R_18_gn.yaml"
    keys = (*TINY, "SOLVER.IMS_PER_BATCH", 1000, "OUTPUT_DIR", tmp_path)
    done = command("tools/pretrain.py", "--config-file", config, *keys)
    assert done.returncode == 1
    assert "objects, fewer than SOLVER.IMS_PER_BATCH 1000" in done.stderr
