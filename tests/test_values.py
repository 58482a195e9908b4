"""Strange values of config keys: each is refused by its key, and none ends in a traceback."""

import pytest
from conftest import SCRATCH, shapes_config

from gn_det.check import ConfigError, check_config
from gn_det.check.evaluation import check_evaluation
from gn_det.engine.describe import describe_recipe

STRANGE = [
    ("SEED", 2**32),
    ("SOLVER.LR_SCHEDULER_NAME", "x"),
    ("SOLVER.LR_SCHEDULER_NAME", "None"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ""),
    ("SOLVER.WARMUP_METHOD", "x"),
    ("DATALOADER.SAMPLER_TRAIN", "x"),
    ("SOLVER.MAX_ITER", 0),
    ("SOLVER.BASE_LR", -1.0),
    ("SOLVER.MOMENTUM", -1.0),
    ("SOLVER.MASK_HEAD_MULTIPLIER", -1.0),
    ("SOLVER.STEPS", "('x',)"),
    ("SOLVER.STEPS", "(-1,)"),
    ("SOLVER.REFERENCE_WORLD_SIZE", -1),
    ("MODEL.FPN.OUT_CHANNELS", -1),
    ("MODEL.FPN.OUT_CHANNELS", 2**32),
    ("MODEL.ROI_BOX_HEAD.NUM_FC", 2**32),
    ("MODEL.ROI_HEADS.NUM_CLASSES", -1),
    ("MODEL.RPN.IOU_THRESHOLDS", "[]"),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[0]"),
    ("MODEL.BACKBONE.NAME", "None"),
    ("MODEL.RPN.IOU_LABELS", "[0,1]"),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.9,0.5]"),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(1.0,1.0)"),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "x"),
    ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "x"),
    ("MODEL.RPN.NMS_THRESH", -1.0),
    ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 0),
    ("MODEL.FPN.FUSE_TYPE", "x"),
    ("MODEL.PIXEL_STD", "[0.0,1.0,1.0]"),
    ("MODEL.PIXEL_STD", "[1.0]"),
    ("INPUT.FORMAT", "YUV-BT.601"),
    ("INPUT.MASK_FORMAT", "x"),
    ("INPUT.RANDOM_FLIP", "x"),
    ("INPUT.CROP.TYPE", "x"),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
    ("SOLVER.CHECKPOINT_PERIOD", 0),
]


@pytest.mark.parametrize(("key", "value"), STRANGE)
def test_strange_values(key, value):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, "SOLVER.STEPS", "()", key, value)
    with pytest.raises(ConfigError) as error:
        check_config(cfg, 1)
    named = key if "ASPECT" not in key else "MODEL.META_ARCHITECTURE"
    assert named in [problem.key for problem in error.value.problems]


@pytest.mark.parametrize(
    ("key", "opts"),
    [
        ("TEST.AUG.ENABLED", ("TEST.AUG.ENABLED", True, "MODEL.META_ARCHITECTURE", "RetinaNet")),
        ("TEST.AUG.ENABLED", ("TEST.AUG.ENABLED", True, "MODEL.KEYPOINT_ON", True)),
        (
            "TEST.KEYPOINT_OKS_SIGMAS",
            ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5),
        ),
    ],
)
def test_evaluations_that_would_fail_after_the_training(key, opts):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, "SOLVER.STEPS", "()", *opts)
    assert key in [problem.key for problem in check_evaluation(cfg)]
    assert not list(check_evaluation(shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH)))


def test_float16_on_a_cpu():
    """It takes many times as long as float32."""
    opts = (*SCRATCH, "SOLVER.AMP.ENABLED", True)
    with pytest.raises(ConfigError, match="bfloat16") as error:
        check_config(shapes_config("mask_rcnn_R_18_FPN_gn", *opts), 1)
    assert [problem.key for problem in error.value.problems] == ["SOLVER.AMP.DTYPE"]
    check_config(shapes_config("mask_rcnn_R_18_FPN_gn", *opts, "SOLVER.AMP.DTYPE", "bfloat16"), 1)


@pytest.mark.parametrize("names", ["()", "('nothing',)"])
def test_training_sets_that_do_not_exist(names):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, "DATASETS.TRAIN", names)
    assert "training would abort" in describe_recipe(cfg, 1)
