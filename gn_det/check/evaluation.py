"""Checks of the keys of `TEST` that Detectron2 would refuse only after the training."""

from collections.abc import Iterator

from detectron2.config import CfgNode

from .problem import Problem

# COCO's keypoints of a person, whose sigmas pycocotools knows
COCO_KEYPOINTS = 17
RCNN = "GeneralizedRCNN"


def check_evaluation(cfg: CfgNode) -> Iterator[Problem]:
    """Check test-time augmentation, the metric to improve and the sigmas of keypoints."""
    without = (
        *(["of other models than GeneralizedRCNN"] * (cfg.MODEL.META_ARCHITECTURE != RCNN)),
        *(["with keypoints"] * cfg.MODEL.KEYPOINT_ON),
        *(["with MODEL.LOAD_PROPOSALS"] * cfg.MODEL.LOAD_PROPOSALS),
    )
    if cfg.TEST.AUG.ENABLED and without:
        reason = f"Detectron2 has no test-time augmentation {' and '.join(without)}"
        yield Problem("TEST.AUG.ENABLED", True, reason, "set it to False")
    if cfg.TEST.VALIDATION_LOSS and cfg.MODEL.META_ARCHITECTURE != RCNN:
        reason = f"{cfg.MODEL.META_ARCHITECTURE} would change its state when it computes losses"
        yield Problem("TEST.VALIDATION_LOSS", True, reason, "set it to False")
    if metric := cfg.TEST.BEST_METRIC:
        if "/" not in metric or (metric.startswith("segm/") and not cfg.MODEL.MASK_ON):
            reason, fix = "the evaluation has no such metric", 'set it to "bbox/AP"'
            yield Problem("TEST.BEST_METRIC", metric, reason, fix)
        elif cfg.TEST.EVAL_PERIOD <= 0:
            reason = "only the final model is evaluated, since TEST.EVAL_PERIOD is 0"
            yield Problem("TEST.BEST_METRIC", metric, reason, "set TEST.EVAL_PERIOD")
    elif cfg.SOLVER.PATIENCE > 0:
        reason, fix = "there is no metric to improve", 'set TEST.BEST_METRIC, such as "segm/AP"'
        yield Problem("SOLVER.PATIENCE", cfg.SOLVER.PATIENCE, reason, fix)
    count, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if cfg.MODEL.KEYPOINT_ON and len(sigmas) != count and (sigmas or count != COCO_KEYPOINTS):
        reason = f"there are {len(sigmas)} of them for {count} keypoints"
        fix = "give one for each of MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
        yield Problem("TEST.KEYPOINT_OKS_SIGMAS", sigmas, reason, fix)
