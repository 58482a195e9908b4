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


@pytest.mark.parametrize("names", ["()", "('nothing',)"])
def test_training_sets_that_do_not_exist(names):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, "DATASETS.TRAIN", names)
    assert "training would abort" in describe_recipe(cfg, 1)
