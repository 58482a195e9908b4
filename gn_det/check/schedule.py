"""The training schedule, and the data that it is for."""

from collections.abc import Iterator
from itertools import pairwise

from detectron2.config import CfgNode

from ..config import is_pretraining
from ..data.coco import count_categories
from .problem import Problem


def check_steps(cfg: CfgNode) -> Iterator[Problem]:
    """Steps of the learning rate that are out of order, or never reached."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return
    # Pretraining counts in epochs, and its iterations follow from them
    section, last = ("PRETRAIN", "EPOCHS") if is_pretraining(cfg) else ("SOLVER", "MAX_ITER")
    key, steps, end = f"{section}.STEPS", cfg[section].STEPS, cfg[section][last]
    if any(one >= two for one, two in pairwise(steps)):
        yield Problem(key, steps, "they do not increase", "put them in order")
    if late := [step for step in steps if step >= end]:
        yield Problem(
            key,
            steps,
            f"the learning rate would never fall at {late}: {section}.{last} is {end}",
            f'scale them with {last}, or set {key} "()"',
        )


def check_batch(cfg: CfgNode, num_gpus: int) -> Iterator[Problem]:
    """Batches that cannot be divided among GPUs and passes."""
    keys = cfg.SOLVER
    gpus = keys.REFERENCE_WORLD_SIZE or num_gpus
    images, rest = divmod(keys.IMS_PER_BATCH, gpus)
    if rest:
        key = "REFERENCE_WORLD_SIZE" if keys.REFERENCE_WORLD_SIZE else "IMS_PER_BATCH"
        why = f"a batch of {keys.IMS_PER_BATCH} cannot be divided among {gpus} GPUs"
        mend = "set SOLVER.REFERENCE_WORLD_SIZE 0 to take the batch as it is, or make it a multiple"
        yield Problem(f"SOLVER.{key}", keys[key], why, mend)
    elif keys.ACCUMULATE_ITERS < 1 or images % keys.ACCUMULATE_ITERS:
        why = f"the {images} images that each GPU takes a step cannot be divided into so many parts"
        mend = "set it to a divisor of them"
        yield Problem("SOLVER.ACCUMULATE_ITERS", keys.ACCUMULATE_ITERS, why, mend)


def check_solver(cfg: CfgNode) -> Iterator[Problem]:
    """Values of gn_det's own keys that there are none of."""
    keys = cfg.SOLVER
    if keys.AMP.DTYPE not in ("float16", "bfloat16"):
        mend = "set it to float16 or bfloat16"
        yield Problem("SOLVER.AMP.DTYPE", keys.AMP.DTYPE, "it is no half precision", mend)
    for key in ("KEEP_CHECKPOINTS", "SKIP_BAD_BATCHES"):
        if keys[key] < 0:
            yield Problem(f"SOLVER.{key}", keys[key], "it is a number of things", "set it to 0")


def check_classes(cfg: CfgNode) -> Iterator[Problem]:
    """A number of classes that is not that of the data sets."""
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return  # others count their classes under keys of their own
    names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    counts = {name: count_categories(name) for name in names}
    wrong = [f"{name} has {n}" for name, n in counts.items() if n not in (None, classes)]
    if wrong:
        why = f"data set {' and '.join(wrong)} categories"
        yield Problem("MODEL.ROI_HEADS.NUM_CLASSES", classes, why, "make them equal")
