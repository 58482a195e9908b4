"""Checks of the training schedule, the batch and the number of classes."""

from collections.abc import Container, Iterator
from importlib.util import find_spec
from itertools import pairwise

from detectron2.config import CfgNode

from ..config import classes_key, is_pretraining, value_of
from ..data.coco import count_categories
from .problem import Problem

# Architectures whose batches cannot be processed in parts: their losses are averaged over positive
# anchors or labelled pixels, and their label maps padded
UNDIVIDED = ("FCOS", "GNRetinaNet", "PanopticFPN", "RetinaNet", "SemanticSegmentor")


def check_steps(cfg: CfgNode) -> Iterator[Problem]:
    """Check for steps of the learning rate that are out of order or never reached."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return
    # In pretraining, SOLVER.STEPS and SOLVER.MAX_ITER are computed from epochs
    section, last = ("PRETRAIN", "EPOCHS") if is_pretraining(cfg) else ("SOLVER", "MAX_ITER")
    key, steps, end = f"{section}.STEPS", cfg[section].STEPS, cfg[section][last]
    if any(one >= two for one, two in pairwise(steps)):
        yield Problem(key, steps, "they do not increase", "sort them")
    if late := [step for step in steps if step >= end]:
        yield Problem(
            key,
            steps,
            f"the learning rate would never drop at {late}: {section}.{last} is {end}",
            f'scale them with {section}.{last}, or set {key} "()"',
        )


def check_batch(cfg: CfgNode, num_gpus: int) -> Iterator[Problem]:
    """Check that the batch can be split over GPUs and accumulated passes."""
    keys = cfg.SOLVER
    gpus = keys.REFERENCE_WORLD_SIZE or num_gpus
    images, rest = divmod(keys.IMS_PER_BATCH, gpus)
    if rest:
        key = "REFERENCE_WORLD_SIZE" if keys.REFERENCE_WORLD_SIZE else "IMS_PER_BATCH"
        reason = f"a batch of {keys.IMS_PER_BATCH} images cannot be split over {gpus} GPUs"
        unscaled = ", or set SOLVER.REFERENCE_WORLD_SIZE 0 to use the batch size unscaled"
        fix = f"use a multiple of {gpus}{unscaled if keys.REFERENCE_WORLD_SIZE else ''}"
        yield Problem(f"SOLVER.{key}", keys[key], reason, fix)
    elif keys.ACCUMULATE_ITERS < 1 or images % keys.ACCUMULATE_ITERS:
        reason = f"the {images} images per GPU and step cannot be split into so many equal passes"
        fix = f"set it to a divisor of {images}"
        yield Problem("SOLVER.ACCUMULATE_ITERS", keys.ACCUMULATE_ITERS, reason, fix)
    elif keys.ACCUMULATE_ITERS > 1 and (name := cfg.MODEL.META_ARCHITECTURE) in UNDIVIDED:
        reason = f"the losses of {name} are not sums over images"
        yield Problem("SOLVER.ACCUMULATE_ITERS", keys.ACCUMULATE_ITERS, reason, "set it to 1")


def unscaled_batch(before: CfgNode, cfg: CfgNode, given: Container[str]) -> str:
    """A warning if only the batch was changed, so that rate and length are for another one.

    Args:
        before: the config file's own config.
        cfg: the config with the user's `KEY VALUE` pairs.
        given: the keys of these pairs.

    Returns:
        one sentence with the values of the linear scaling rule; "" if there is nothing to warn of.
    """
    keys, old = cfg.SOLVER, before.SOLVER
    scale = keys.IMS_PER_BATCH / old.IMS_PER_BATCH
    # Detectron2 scales these keys itself for another number of GPUs
    if scale == 1 or "SOLVER.BASE_LR" in given or keys.REFERENCE_WORLD_SIZE or is_pretraining(cfg):
        return ""
    length = (
        ""
        if "SOLVER.MAX_ITER" in given
        else (
            f", SOLVER.MAX_ITER {round(keys.MAX_ITER / scale)} and SOLVER.STEPS "
            f'"({",".join(str(round(step / scale)) for step in keys.STEPS)})"'
        )
    )
    return (
        f"SOLVER.IMS_PER_BATCH is {keys.IMS_PER_BATCH} instead of the config's "
        f"{old.IMS_PER_BATCH}, at the same learning rate: the linear scaling rule gives "
        f"SOLVER.BASE_LR {keys.BASE_LR * scale:g}{length}"
    )


def check_solver(cfg: CfgNode) -> Iterator[Problem]:
    """Check mixed precision, and whether images can be drawn during training."""
    keys = cfg.SOLVER
    if keys.AMP.DTYPE not in ("float16", "bfloat16"):
        fix = "set it to float16 or bfloat16"
        yield Problem("SOLVER.AMP.DTYPE", keys.AMP.DTYPE, "it is not a 16-bit float type", fix)
    elif keys.AMP.ENABLED and keys.AMP.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        reason, fix = "float16 is many times slower than float32 on a CPU", "set it to bfloat16"
        yield Problem("SOLVER.AMP.DTYPE", keys.AMP.DTYPE, reason, fix)
    if cfg.VIS_PERIOD > 0 and find_spec("cv2") is None:
        fix = "run pip install opencv-python-headless, or set it to 0"
        yield Problem("VIS_PERIOD", cfg.VIS_PERIOD, "Detectron2 draws with OpenCV (cv2)", fix)


def check_classes(cfg: CfgNode) -> Iterator[Problem]:
    """Check that the model's number of classes is the number of categories of the datasets."""
    if not (key := classes_key(cfg)):
        return
    classes = value_of(cfg, key)
    names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    counts = {name: count_categories(name) for name in names}
    wrong = [f"{name} has {n}" for name, n in counts.items() if n not in (None, classes)]
    if wrong:
        reason = f"dataset {' and '.join(wrong)} categories"
        fix = "set it to that number, or change DATASETS"
        yield Problem(key, classes, reason, fix)
