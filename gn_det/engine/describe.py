"""A readable summary of a training recipe, which `--check` prints."""

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver import build_lr_scheduler
from torch import nn
from torch.optim import Optimizer

from ..check.weights import grouping_mismatch
from ..checkpoint.checkpointer import StrictCheckpointer
from ..checkpoint.facts import describe
from ..config import is_clips, is_pretraining
from ..data.image_folder import read_folder
from ..errors import InputError
from ..modeling import build_on_meta_device
from ..modeling.parts import BACKBONE_PARTS, count_parts, part_of, weight_names
from ..solver import build_optimizer, describe_groups, images_per_pass, is_norm
from .pretrain_schedule import resolve_config
from .run_record import count_parameters

# More epochs than any schedule for a small dataset has
MANY_EPOCHS = 1000


def describe_recipe(cfg: CfgNode, num_gpus: int = 1) -> str:
    """Describe how a config would be trained, without training or downloading anything.

    Args:
        cfg: a config that passes `check_config`.
        num_gpus: total number of GPUs; Detectron2 scales batch and schedule to it if
            `SOLVER.REFERENCE_WORLD_SIZE` is set.

    Returns:
        lines of text, in sections such as "norm layers" and "optimizer".
    """
    cfg = DefaultTrainer.auto_scale_workers(_resolved(cfg), num_gpus)
    model = build_on_meta_device(cfg)
    with logging_disabled():
        optimizer = build_optimizer(cfg, model)
    sections = {
        "norm layers": _norm_layers(cfg, model),
        "frozen": _frozen(cfg, model),
        "optimizer": _optimizer(cfg, optimizer, model),
        "batch": _batch(cfg, num_gpus),
        "training set": _data(cfg),
        "learning rate": _learning_rates(cfg),
        "initial weights": _initial_weights(cfg, model),
    }
    return "\n".join(as_section(title, lines) for title, lines in sections.items())


def as_section(title: str, lines: Iterable[str]) -> str:
    """Lines of text, indented, with a title before the first one."""
    return "\n".join(f"{'' if i else title:17}{line}" for i, line in enumerate(lines))


def _resolved(cfg: CfgNode) -> CfgNode:
    """The config that the trainer would use.

    In pretraining, an epoch has 1000 iterations if the training folder is not found.
    """
    if not is_pretraining(cfg):
        return cfg
    try:
        folder = read_folder(cfg.DATASETS.TRAIN[0], is_clips(cfg))
    except InputError:
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        cfg = resolve_config(cfg, 1000 * cfg.SOLVER.IMS_PER_BATCH, classes)
        cfg.defrost()
        cfg.SOLVER.WARMUP_ITERS = 0
        return cfg
    return resolve_config(cfg, len(folder), len(folder.classes))


def _norm_layers(cfg: CfgNode, model: nn.Module) -> Iterator[str]:
    """Kinds and numbers of norm layers in each part of the model."""
    kinds: dict[str, Counter[str]] = {part: Counter() for part in count_parts(weight_names(model))}
    frozen: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d) or is_norm(module):
            part = part_of(f"{name}.")
            kinds[part][_kind(cfg, module, part)] += 1
            frozen[part] += any(not p.requires_grad for p in module.parameters())
    for part, counts in kinds.items():
        text = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
        yield f"{part}: {text}{f'; {frozen[part]} with gamma and beta frozen' * (frozen[part] > 0)}"


def _kind(cfg: CfgNode, norm: nn.Module, part: str) -> str:
    """The kind of a norm layer in a part of the model, as "GN (32 groups)"."""
    if isinstance(norm, nn.GroupNorm):
        keys, width = cfg.MODEL.GROUP_NORM, norm.num_channels // norm.num_groups
        heads_width = keys.HEADS_DIM_PER_GP if part not in BACKBONE_PARTS else -1
        if width == (heads_width if heads_width > 0 else keys.DIM_PER_GP):
            return f"GN ({width} channels per group)"
        configured = keys.NUM_GROUPS, keys.HEADS_NUM_GROUPS
        if norm.num_groups in configured or norm.num_groups > 1 < width:
            return f"GN ({norm.num_groups} groups)"
        return "LN (one group)" if norm.num_groups == 1 else "IN (one channel per group)"
    name = type(norm).__name__
    return name.removesuffix("2d").removesuffix("Act").replace("BatchNorm", "BN")


def _frozen(cfg: CfgNode, model: nn.Module) -> Iterator[str]:
    """Frozen stages of the backbone, and numbers of trained and frozen parameters."""
    stages = {
        re.sub(r"^backbone\.(bottom_up\.)?", "", name).partition(".")[0]
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    key = f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}"
    yield f"stages: {', '.join(sorted(stages, key=lambda s: (s != 'stem', s))) or 'none'} ({key})"
    numbers = count_parameters(model)
    yield f"parameters: {numbers['trainable']:,} trained, {numbers['frozen']:,} frozen"


def _optimizer(cfg: CfgNode, optimizer: Optimizer, model: nn.Module) -> Iterator[str]:
    """Settings of the optimizer, and one line for each parameter group."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clipped = f", gradients clipped by {clip.CLIP_TYPE} at {clip.CLIP_VALUE:g}"
    momentum = f"momentum {cfg.SOLVER.MOMENTUM:g}"
    amp = f", {cfg.SOLVER.AMP.DTYPE}" if cfg.SOLVER.AMP.ENABLED else ""
    yield f"SGD, {momentum}{clipped if clip.ENABLED else ''}{amp}"
    yield from describe_groups(optimizer, model)


def _batch(cfg: CfgNode, num_gpus: int) -> Iterator[str]:
    """Images per step and per forward pass."""
    images = cfg.SOLVER.IMS_PER_BATCH
    gpus = f"{num_gpus} GPU{'s' * (num_gpus > 1)}"
    each = f"{images_per_pass(cfg, num_gpus):g} per pass on {gpus}"
    parts = cfg.SOLVER.ACCUMULATE_ITERS
    yield f"{images} images per step: {each}{f', {parts} passes' if parts > 1 else ''}"


def _data(cfg: CfgNode) -> Iterator[str]:
    """Size of the training set and number of epochs, or the path where it was not found."""
    names = list(cfg.DATASETS.TRAIN)
    if is_pretraining(cfg):
        epochs = f"{cfg.PRETRAIN.EPOCHS} epochs"
        try:
            folder = read_folder(names[0], is_clips(cfg))
        except InputError:
            yield f"{names[0]} NOT FOUND: training would abort; {epochs}"
            return
        kind = "clips" if is_clips(cfg) else "images"
        size = f"{len(folder):,} {kind} in {len(folder.classes):,} classes"
        yield f"{names[0]}: {size}, {epochs} in {cfg.SOLVER.MAX_ITER:,} steps"
        return
    seen = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    for name in names:
        if name not in DatasetCatalog.list():
            yield f"{seen:,} images; {name} is NOT REGISTERED: training would abort"
            return
        path = MetadataCatalog.get(name).get("json_file")
        if path is not None and not os.path.isfile(path):
            yield f"{seen:,} images; {name} NOT FOUND ({path}): training would abort"
            return
    if not names:
        yield "none (DATASETS.TRAIN is empty): training would abort"
        return
    empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    images = len(get_detection_dataset_dicts(names, filter_empty=empty))
    kind = "images with annotations" if empty else "images"
    epochs = seen / images
    many = ": far more than usual, lower SOLVER.MAX_ITER" if epochs > MANY_EPOCHS else ""
    yield f"{', '.join(names)}: {images:,} {kind}, {epochs:,.1f} epochs{many}"


def _learning_rates(cfg: CfgNode) -> Iterator[str]:
    """The base learning rate at the iterations where the schedule changes it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    end = cfg.SOLVER.MAX_ITER
    changes = {0, min(cfg.SOLVER.WARMUP_ITERS, end), end // 2, end}
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        changes = {
            0,
            min(cfg.SOLVER.WARMUP_ITERS, end),
            *(s for s in cfg.SOLVER.STEPS if s < end),
            end,
        }
    for step in sorted(changes):
        scheduler.last_epoch = step
        when = f"step {step:,}"
        if is_pretraining(cfg):
            when = f"epoch {step / end * cfg.PRETRAIN.EPOCHS:.4g}"
        yield f"{when}: " + ("the end" if step == end else f"{scheduler.get_lr()[0]:.4g}")


def _initial_weights(cfg: CfgNode, model: nn.Module) -> Iterator[str]:
    """Numbers of tensors in each part that `MODEL.WEIGHTS` fills."""
    weights = cfg.MODEL.WEIGHTS
    tensors = set(weight_names(model))
    if not weights:
        yield "none: all tensors are randomly initialized"
        return
    if os.path.isfile(weights):
        yield weights
        filled, unused = _matched(model, weights)
    elif "://" not in weights:
        yield f"{weights} NOT FOUND: training would abort"
        return
    elif describe(weights):
        yield f"{weights}, a published backbone that is downloaded when training starts"
        filled, unused = {n for n in tensors if part_of(n) in BACKBONE_PARTS}, set()
    else:
        yield f"{weights}: content unknown until it is downloaded"
        return
    for title, names in (("loaded", filled), ("random", tensors - filled)):
        parts = ", ".join(f"{part} {count}" for part, count in count_parts(names).items())
        yield f"{title}: {len(names)} of {len(tensors)} tensors ({parts or 'none'})"
    if warning := grouping_mismatch(cfg):
        yield warning
    if unused:
        yield f"unused: {len(unused)} tensors of the file, such as {min(unused)}"


def filled_parts(cfg: CfgNode) -> set[str] | None:
    """The parts of the model that `MODEL.WEIGHTS` fills, as `part_of` names them.

    Args:
        cfg: a config that passes `check_config`.

    Returns:
        names of parts; None if the weights are not in a local file.
    """
    if not os.path.isfile(cfg.MODEL.WEIGHTS):
        return None
    filled, _ = _matched(build_on_meta_device(cfg), cfg.MODEL.WEIGHTS)
    return {part_of(name) for name in filled}


def _matched(model: nn.Module, weights: str) -> tuple[set[str], set[str]]:
    """Names of tensors of the model that a file fills, and of unused tensors in the file."""
    checkpointer = StrictCheckpointer(model)
    with logging_disabled(), warnings.catch_warnings():
        # PyTorch warns that copying to the meta device does nothing, which is intended here
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        checkpointer.load(weights, checkpointables=[])
    assert checkpointer.loaded is not None
    return {*checkpointer.loaded.model} - checkpointer.loaded.fresh, checkpointer.loaded.unused


@contextmanager
def logging_disabled() -> Iterator[None]:
    """Suppress log lines whose content `--check` prints in another form."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
