"""What only the model's own layers show."""

from collections.abc import Iterator

from detectron2.config import CfgNode
from torch import nn

from ..config import is_pretraining
from ..errors import InputError
from ..modeling import build_without_memory
from ..solver import images_per_pass, is_norm
from .problem import Problem

# What Detectron2 raises for values that it cannot build a model from
BUILD_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError)


def check_groups(cfg: CfgNode) -> Problem | None:
    """What is wrong with the division of channels into groups, if anything."""
    keys = cfg.MODEL.GROUP_NORM
    count, width = "MODEL.GROUP_NORM.NUM_GROUPS", "MODEL.GROUP_NORM.DIM_PER_GP"
    # 32 is the default, so it may stand beside a width that was asked for
    if keys.DIM_PER_GP > 0 and keys.NUM_GROUPS not in (-1, 32):
        why = f"{count} is set as well, to {keys.NUM_GROUPS}, and only one of them can hold"
        return Problem(width, keys.DIM_PER_GP, why, "set one of them to -1")
    if keys.DIM_PER_GP < 1 and keys.NUM_GROUPS < 1:
        return Problem(count, keys.NUM_GROUPS, f"{width} is not set either", "set one of them")
    try:
        build_without_memory(cfg)
    except InputError as error:
        why, _, mend = str(error).rpartition("; ")
        key = mend.removeprefix("change ")
        return Problem(key, keys[key.rpartition(".")[2]], why, mend)
    except BUILD_ERRORS:
        return None  # `check_layers` tells what else is wrong
    return None


def check_layers(cfg: CfgNode, num_gpus: int) -> Iterator[Problem]:
    """Layers that would stay random, decay, or see too few images; models that cannot be built."""
    try:
        model = build_without_memory(cfg)
    except BUILD_ERRORS as error:
        why = f"the model cannot be built ({type(error).__name__}: {error})"
        name = cfg.MODEL.META_ARCHITECTURE
        yield Problem("MODEL.META_ARCHITECTURE", name, why, "change the key that this is about")
        return
    if not cfg.MODEL.WEIGHTS:
        yield from _from_scratch(cfg, model)
    trained = [
        name
        for name, module in model.named_modules()
        if is_norm(module) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    decay = cfg.SOLVER.WEIGHT_DECAY_NORM
    if trained and decay and not is_pretraining(cfg):
        why = f"gamma and beta of {len(trained)} norm layers would be decayed, which costs AP"
        yield Problem("SOLVER.WEIGHT_DECAY_NORM", decay, why, "set SOLVER.WEIGHT_DECAY_NORM 0.0")
    yield from _too_few_images(cfg, model, num_gpus)


def _too_few_images(cfg: CfgNode, model: nn.Module, num_gpus: int) -> Iterator[Problem]:
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        in_step = "Sync" in type(module).__name__
        if in_step and cfg.MODEL.DEVICE == "cpu":
            why = f"{name} is SyncBatchNorm, which PyTorch has for GPUs alone"
            mend = "train on a GPU, or take GN, FrozenBN or BN in the place of SyncBN"
            yield Problem("MODEL.DEVICE", "cpu", why, mend)
            return
        images = images_per_pass(cfg, num_gpus) * (num_gpus if in_step else 1)
        if images <= 1:
            why = f"{name} is BatchNorm, and would take its statistics from a single image"
            mend = "take more images, or GN or FrozenBN in the place of BN"
            yield Problem("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, why, mend)
            return


def _from_scratch(cfg: CfgNode, model: nn.Module) -> Iterator[Problem]:
    keys = cfg.MODEL
    backbone = getattr(model, "backbone", model)
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    if frozen:
        why = (
            f"MODEL.WEIGHTS is empty, so {len(frozen)} tensors, {frozen[0]} the first, would stay "
            "random and untrained (Detectron's own accident: 36.2 instead of 39.5 AP)"
        )
        freeze_at = keys.BACKBONE.FREEZE_AT
        yield Problem("MODEL.BACKBONE.FREEZE_AT", freeze_at, why, "set MODEL.BACKBONE.FREEZE_AT 0")
    if keys.RESNETS.NORM == "FrozenBN" and "resnet" in keys.BACKBONE.NAME:
        why = "MODEL.WEIGHTS is empty, so it would normalise nothing, and training would diverge"
        yield Problem("MODEL.RESNETS.NORM", "FrozenBN", why, "set it to GN, or give weights")
