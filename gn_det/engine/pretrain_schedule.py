"""Conversion of the pretraining schedule from epochs to Detectron2's iterations."""

from itertools import pairwise

from detectron2.config import CfgNode

from ..config import is_clips
from ..data.image_folder import read_folder
from ..errors import InputError


def check_folders(cfg: CfgNode, train: bool = True) -> None:
    """Check the image folders that `DATASETS` names.

    Args:
        cfg: the config of a classifier.
        train: whether to check the training folder too; else only the test folders.

    Raises:
        InputError: for a folder that cannot be used, for folders with different classes, and for a
            training folder with fewer images than a batch.
    """
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(f'INPUT.FORMAT {cfg.INPUT.FORMAT}: pretraining supports "RGB" and "BGR"')
    if train and len(cfg.DATASETS.TRAIN) != 1:
        raise InputError(
            f"DATASETS.TRAIN {cfg.DATASETS.TRAIN}: pretraining needs exactly one folder"
        )
    if not train and not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty: set it to the folder to evaluate on")
    clips = is_clips(cfg)
    names = [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]
    for name in names[1:]:
        one, two = (set(read_folder(n, clips).classes) for n in (names[0], name))
        if one != two:
            raise InputError(
                f"{names[0]} has {len(one)} classes and {name} has {len(two)}, and only one of "
                f"them has {min(one ^ two)}: their subfolders must have the same names"
            )
    if len(classes := read_folder(names[0], clips).classes) < 2:
        raise InputError(
            f"{names[0]} has only one class, {classes[0]}: name the folder that directly contains "
            "one subfolder per class"
        )
    images = len(read_folder(names[0], clips))
    if train and images < cfg.SOLVER.IMS_PER_BATCH:
        raise InputError(
            f"{names[0]} has {images} images, fewer than SOLVER.IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH}: use more images or a smaller batch"
        )


def with_classes(cfg: CfgNode, classes: int) -> CfgNode:
    """A copy of a config with another number of classes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.freeze()
    return cfg


def resolve_config(cfg: CfgNode, images: int, classes: int) -> CfgNode:
    """Compute the config for Detectron2's trainer from the keys in `PRETRAIN` (Section 4.1).

    The learning rate is scaled linearly to the batch size. The schedule in epochs is converted to
    iterations. A `TEST.EVAL_PERIOD` or `SOLVER.CHECKPOINT_PERIOD` of -1 becomes one epoch.

    Args:
        cfg: the config of a classifier; not changed.
        images: number of images in the training folder.
        classes: number of its subfolders.

    Returns:
        the frozen config.

    Raises:
        InputError: if two steps of the learning rate fall on the same iteration.
    """
    keys = cfg.PRETRAIN
    batch = cfg.SOLVER.IMS_PER_BATCH
    end, *steps = (round(n * images / batch) for n in (keys.EPOCHS, *keys.STEPS))
    if any(one >= two for one, two in pairwise([0, *steps, end])):
        raise InputError(
            f"PRETRAIN.STEPS {keys.STEPS} are the iterations {steps} of {end}, with {images} "
            f"images in batches of {batch}: use a smaller batch, or fewer steps"
        )
    cfg = with_classes(cfg, classes)
    cfg.defrost()
    cfg.SOLVER.BASE_LR *= batch / keys.REFERENCE_BATCH_SIZE
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = end, tuple(steps)
    for section, key in ((cfg.SOLVER, "CHECKPOINT_PERIOD"), (cfg.TEST, "EVAL_PERIOD")):
        if section[key] == -1:
            section[key] = round(images / batch)
    cfg.freeze()
    return cfg
