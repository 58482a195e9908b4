"""Recipes adapted to a dataset, compared with sizes and rates worked out by hand."""

import json

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torchvision.ops import box_iou

from gn_det.check.anchors import objects_out_of_reach
from gn_det.check.schedule import check_steps
from gn_det.config_file import read_config
from gn_det.data.object_sizes import ObjectSizes
from gn_det.engine.autoconfig import (
    drop_overridden,
    images_seen,
    propose_heads_grouping,
    propose_mask_head,
    propose_schedule,
    propose_sizes,
)
from gn_det.errors import InputError


def config(name: str = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn.yaml"):
    return read_config(name)


def sizes_of(side: int, objects: float, count: int = 40) -> ObjectSizes:
    """Square images with one square object each."""
    images = np.full((count, 2), float(side))
    return ObjectSizes(images, np.full((count, 2), float(objects)), np.arange(count))


def proposed(cfg, sizes: ObjectSizes) -> dict:
    return {p.key: p.value for p in propose_sizes(cfg, sizes)}


def unmatched_share(cfg, sizes: ObjectSizes) -> float:
    """Fraction of the objects that match no anchor, as the check reports it."""
    lines = list(objects_out_of_reach(cfg, sizes))
    return float(lines[0].partition("%")[0]) / 100 if lines else 0.0


def test_no_proposals_for_coco_sized_images():
    """The recipe was made for such images and objects."""
    assert proposed(config(), sizes_of(1000, 100)) == {}


def test_small_images_with_small_objects():
    """256 pixels with objects of 20: images are enlarged until objects have 32 pixels."""
    keys = proposed(config(), sizes_of(256, 20))
    assert keys["INPUT.MIN_SIZE_TEST"] == 416  # 256 * 32 / 20 = 409.6, in steps of 32
    assert keys["INPUT.MAX_SIZE_TEST"] == round(1333 * 416 / 800)
    assert keys["INPUT.MIN_SIZE_TRAIN"] == tuple(
        round(side * 416 / 800) for side in (640, 672, 704, 736, 768, 800)
    )
    # 20 * 416 / 256 = 32.5 pixels match the recipe's smallest anchor of 32
    assert "MODEL.ANCHOR_GENERATOR.SIZES" not in keys


def test_tiny_objects():
    """Images are enlarged at most by 2, and the anchors are made smaller."""
    cfg = config()
    sizes = sizes_of(256, 8)
    keys = proposed(cfg, sizes)
    assert keys["INPUT.MIN_SIZE_TEST"] == 512
    assert keys["MODEL.ANCHOR_GENERATOR.SIZES"] == [[16], [32], [64], [128], [256]]
    anchors = keys.pop("MODEL.ANCHOR_GENERATOR.SIZES")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([str(word) for pair in keys.items() for word in pair])
    assert unmatched_share(cfg, sizes) == 1
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = anchors
    assert unmatched_share(cfg, sizes) == 0


def test_share_of_unmatched_objects():
    """Compared with the IoU of Detectron2's anchors, after Detectron2's resizing."""
    cfg = config("Shapes/mask_rcnn_R_18_FPN_gn.yaml")
    rng = np.random.default_rng(0)
    objects = rng.uniform(2, 300, (200, 2))
    images = rng.uniform(300, 600, (200, 2)).round()
    reported = unmatched_share(cfg, ObjectSizes(images, objects, np.arange(200)))
    sizes, ratios = (cfg.MODEL.ANCHOR_GENERATOR[key] for key in ("SIZES", "ASPECT_RATIOS"))
    cells = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=ratios, strides=[4, 8, 16, 32, 64]
    ).cell_anchors
    anchors = torch.cat(list(cells))
    unmatched = 0
    for (width, height), (w, h) in zip(images.astype(int), objects, strict=True):
        resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        transform = resize.get_transform(np.zeros((height, width, 3), dtype=np.uint8))
        box = transform.apply_box(np.array([[0, 0, w, h]]))[0]
        (x, y) = box[2:] / 2
        centred = torch.tensor([[-x, -y, x, y]], dtype=torch.float32)
        unmatched += bool(box_iou(centred, anchors).max() < 0.5)
    assert reported == pytest.approx(unmatched / 200, abs=0.02)


@pytest.mark.parametrize(
    ("budget", "num_images", "seen"),
    [
        ("24epochs", 100, 2400),
        ("2.5e", 100, 250),
        ("500", 100, 2000),
        (None, 2800, 12 * 2800),
        (None, 100_000, 1_200_000),
        (None, 175, 48 * 175),
    ],
)
def test_budget(budget, num_images, seen):
    assert images_seen(budget, num_images, largest_batch=4)[0] == seen


@pytest.mark.parametrize("budget", ["", "0", "0epochs", "-5", "5 days", "nan"])
def test_malformed_budget(budget):
    with pytest.raises(InputError, match=rf"--budget {budget}: .*5000.*24epochs"):
        images_seen(budget, 100, 4)


def test_schedule():
    """Equal numbers of images; the rate is linear in the batch size; steps are scaled."""
    cfg = config()  # 16 images, rate 0.02, 90000 iterations, steps at 60000 and 80000
    keys = {}
    for batch in (1, 4):
        keys[batch] = {p.key: p.value for p in propose_schedule(cfg, 9000, batch, "")}
        assert keys[batch]["SOLVER.MAX_ITER"] * batch == 9000
    assert keys[1]["SOLVER.BASE_LR"] == pytest.approx(0.02 / 16)
    assert keys[4]["SOLVER.BASE_LR"] == pytest.approx(0.02 / 4)
    assert keys[4]["SOLVER.STEPS"] == (1500, 2000)
    assert keys[4]["SOLVER.WARMUP_ITERS"] == 225 and keys[1]["SOLVER.WARMUP_ITERS"] == 900
    assert keys[4]["SOLVER.REFERENCE_WORLD_SIZE"] == 0


def test_user_keys_are_kept():
    """If the user sets one input size, no other input size is changed."""
    proposals = list(propose_sizes(config(), sizes_of(256, 3)))
    left = drop_overridden(proposals, ["INPUT.MIN_SIZE_TEST", "300"])
    assert {p.key for p in proposals} - {p.key for p in left} == {
        f"INPUT.{end}_SIZE_{split}" for end in ("MIN", "MAX") for split in ("TRAIN", "TEST")
    }
    # The anchors then fit that size: objects of 20 pixels in images that are not resized
    cfg = config().clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    keys = {
        p.key: p.value for p in propose_sizes(cfg, sizes_of(256, 20), ["INPUT.MIN_SIZE_TEST", "0"])
    }
    assert keys == {"MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]]}


def test_sizes_of_a_file(tmp_path):
    """Crowds and images without objects are left out."""
    entry = {"width": 10, "height": 20}
    boxes = [(1, [0, 0, 3, 4], 0), (1, [0, 0, 9, 9], 1), (3, [1, 1, 5, 6], 0)]
    content = {
        "images": [{"id": number, **entry} for number in (1, 2, 3)],
        "annotations": [{"image_id": i, "bbox": box, "iscrowd": c} for i, box, c in boxes],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    sizes = ObjectSizes.of(tmp_path / "train.json")
    assert sizes.images.tolist() == [[10, 20]] * 2
    assert sizes.objects.tolist() == [[3, 4], [5, 6]] and sizes.owners.tolist() == [0, 1]
    assert sizes.resized(20, 30).tolist() == [[4.5, 6], [7.5, 9]]


def test_more_objects_than_detections():
    """Objects beyond the limit are reported, unless COCO's limit of 100 leaves them out anyway."""
    cfg = config("Shapes/mask_rcnn_R_18_FPN_gn.yaml")  # 30 detections per image
    owners = np.repeat(np.arange(3), (30, 31, 120))
    sizes = ObjectSizes(np.full((3, 2), 192.0), np.full((len(owners), 2), 64.0), owners)
    (line,) = objects_out_of_reach(cfg, sizes)
    assert line.startswith("2 ") and "120" in line
    assert "TEST.DETECTIONS_PER_IMAGE 30" in line
    assert list(objects_out_of_reach(config(), sizes)) == []


@pytest.mark.parametrize("end", range(1, 12))
def test_schedules_of_a_few_iterations_pass_the_checks(end):
    """Rounded steps must not coincide, or be 0 or MAX_ITER."""
    cfg = config()
    proposals = propose_schedule(cfg, 2 * end, 2, "")
    opts = [str(word) for p in proposals for word in (p.key, p.value)]
    short = read_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn.yaml", opts)
    assert short.SOLVER.MAX_ITER == end
    assert not list(check_steps(short))


def test_grouping_of_the_heads():
    """Two channels per group, unless user or config chose, or Detectron2 builds the parts."""
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_4conv1fc.yaml"
    key = "MODEL.GROUP_NORM.HEADS_DIM_PER_GP"
    proposal = [(p.key, p.value) for p in propose_heads_grouping(config(name))]
    assert proposal == [(key, 2)]
    assert not list(propose_heads_grouping(config(name), ["MODEL.GROUP_NORM.NUM_GROUPS", "32"]))
    for own in (key, "MODEL.GROUP_NORM.DIM_PER_GP"):
        assert not list(propose_heads_grouping(read_config(name, [own, "4"])))
    stock = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    assert not list(propose_heads_grouping(read_config(name, stock)))


def test_rate_of_the_mask_head():
    """The factor is the same for all norms, and a factor of the config is kept."""
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_4conv1fc.yaml"
    keys = ["SOLVER.MAX_ITER", "200", "SOLVER.BASE_LR", "0.005", "SOLVER.STEPS", "()"]
    (proposal,) = propose_mask_head(read_config(name, keys))
    assert (proposal.key, proposal.value) == ("SOLVER.MASK_HEAD_MULTIPLIER", 4.0)
    assert not list(propose_mask_head(read_config(name, [*keys, proposal.key, "1.0"])))
    assert not list(propose_mask_head(read_config(name, [*keys, "MODEL.MASK_ON", "False"])))
