"""From the epochs of pretraining to the iterations that Detectron2 counts in."""

from itertools import pairwise

from detectron2.config import CfgNode

from ..data.image_folder import read_folder
from ..errors import InputError


def check_folders(cfg: CfgNode, train: bool = True) -> None:
    """Check that the folders of `DATASETS` can be trained and tested on.

    Args:
        train: whether training is wanted, and not only evaluation.

    Raises:
        InputError: for a folder that cannot be used, folders of different classes, and a training
            folder of fewer pictures than a batch.
    """
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(f'INPUT.FORMAT {cfg.INPUT.FORMAT}: pretraining takes "RGB" or "BGR"')
    if train and len(cfg.DATASETS.TRAIN) != 1:
        raise InputError(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN}: pretraining takes one folder")
    if not train and not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST names no folder to evaluate on")
    names = [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]
    for name in names[1:]:
        one, two = (set(read_folder(n).classes) for n in (names[0], name))
        if one != two:
            raise InputError(
                f"{names[0]} has {len(one)} classes and {name} has {len(two)}, and only one of "
                f"them has {min(one ^ two)}: their sub-folders must have the same names"
            )
    if len(classes := read_folder(names[0]).classes) < 2:
        raise InputError(
            f"{names[0]} has one class only, {classes[0]}: it must hold a sub-folder for each, and "
            "not the folder that these are in"
        )
    pictures = len(read_folder(names[0]))
    if train and pictures < cfg.SOLVER.IMS_PER_BATCH:
        raise InputError(
            f"{names[0]} holds {pictures} pictures, fewer than SOLVER.IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH}: take more pictures or a smaller batch"
        )


def with_classes(cfg: CfgNode, classes: int) -> CfgNode:
    """The config of a classifier of so many classes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.freeze()
    return cfg


def resolve_config(cfg: CfgNode, pictures: int, classes: int) -> CfgNode:
    """The config for Detectron2's trainer, by the paper's Section 4.1.

    The learning rate is linear in the batch, and the schedule is `PRETRAIN`'s in iterations. A
    `TEST.EVAL_PERIOD` or `SOLVER.CHECKPOINT_PERIOD` of -1 becomes one epoch.

    Args:
        pictures: how many the training folder holds.
        classes: how many sub-folders it has.

    Raises:
        InputError: if two steps of the learning rate fall on the same iteration.
    """
    keys = cfg.PRETRAIN
    batch = cfg.SOLVER.IMS_PER_BATCH
    end, *steps = (round(n * pictures / batch) for n in (keys.EPOCHS, *keys.STEPS))
    if any(one >= two for one, two in pairwise([0, *steps, end])):
        raise InputError(
            f"PRETRAIN.STEPS {keys.STEPS} are the iterations {steps} of {end}, with {pictures} "
            f"pictures in batches of {batch}: take a smaller batch, or fewer steps"
        )
    cfg = with_classes(cfg, classes)
    cfg.defrost()
    cfg.SOLVER.BASE_LR *= batch / keys.REFERENCE_BATCH_SIZE
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = end, tuple(steps)
    for section, key in ((cfg.SOLVER, "CHECKPOINT_PERIOD"), (cfg.TEST, "EVAL_PERIOD")):
        if section[key] == -1:
            section[key] = round(pictures / batch)
    cfg.freeze()
    return cfg
