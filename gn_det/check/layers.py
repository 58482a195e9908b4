"""Checks that need the layers of the model, which is built on the meta device."""

import re
from collections.abc import Iterator

from detectron2.config import CfgNode
from torch import nn

from ..config import is_pretraining, value_of
from ..errors import InputError
from ..modeling import build_on_meta_device
from ..modeling.conv import StandardizedConv2d
from ..modeling.norm import backbone_norm, backbone_section
from ..solver import images_per_pass, is_norm
from .problem import Problem

# Exceptions of Detectron2's builders for values that no model can be built from
BUILD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError),
    *(RuntimeError, TypeError, ValueError),
)


def check_layers(cfg: CfgNode, num_gpus: int) -> Iterator[Problem]:
    """Check the grouping of channels, frozen and decayed layers, and the batch of BatchNorm.

    Args:
        cfg: the config.
        num_gpus: total number of GPUs on all machines.

    Yields:
        the problems; only the first one if no model can be built from the config.
    """
    cfg = cfg.clone()
    cfg.defrost()
    # The layers are the same in every implementation, whose keys `check_implementation` checks
    cfg.MODEL.GROUP_NORM.IMPL, cfg.MODEL.GROUP_NORM.RECOMPUTE = "native", "none"
    model = _build(cfg)
    if isinstance(model, Problem) and model.key.startswith("MODEL.GROUP_NORM."):
        yield model
        # One group works with any number of channels, so that the other checks can run
        keys = cfg.MODEL.GROUP_NORM
        keys.NUM_GROUPS, keys.DIM_PER_GP = 1, -1
        keys.HEADS_NUM_GROUPS = keys.HEADS_DIM_PER_GP = -1
        model = _build(cfg)
    if isinstance(model, Problem):
        yield model
        return
    if not cfg.MODEL.WEIGHTS:
        yield from _check_scratch(cfg, model)
    trained = [
        name
        for name, module in model.named_modules()
        if is_norm(module) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    decay = cfg.SOLVER.WEIGHT_DECAY_NORM
    if trained and decay and not is_pretraining(cfg):
        reason = f"weight decay on gamma and beta of {len(trained)} norm layers costs AP"
        yield Problem("SOLVER.WEIGHT_DECAY_NORM", decay, reason, "set SOLVER.WEIGHT_DECAY_NORM 0.0")
    yield from _check_batch_norm(cfg, model, num_gpus)
    standardized = any(isinstance(layer, StandardizedConv2d) for layer in model.modules())
    if cfg.MODEL.RESNETS.WEIGHT_STANDARDIZATION and not standardized:
        key, name = "MODEL.RESNETS.WEIGHT_STANDARDIZATION", cfg.MODEL.BACKBONE.NAME
        reason = f"no convolution of MODEL.BACKBONE.NAME {name} with a norm applies it"
        yield Problem(key, True, reason, "set it to False, or use a builder of gn_det")


def _build(cfg: CfgNode) -> nn.Module | Problem:
    """Build the model on the meta device, or return the problem that prevents it."""
    if problem := _check_grouping_keys(cfg):
        return problem
    try:
        return build_on_meta_device(cfg)
    except BUILD_ERRORS as error:
        if isinstance(error, ImportError) and "_C" in str(error):
            deformable = any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)
            key = "RESNETS.DEFORM_ON_PER_STAGE" if deformable else "META_ARCHITECTURE"
            key = f"MODEL.{key}"
            reason = "it needs the C++ operators (detectron2._C), which this Detectron2 lacks"
            return Problem(key, value_of(cfg, key), reason, "build Detectron2 from its sources")
        if isinstance(error, InputError) and error.key:
            return Problem(error.key, value_of(cfg, error.key), error.reason, error.fix)
        reason = f"the model cannot be built ({type(error).__name__}: {error})"
        name = cfg.MODEL.META_ARCHITECTURE
        return Problem("MODEL.META_ARCHITECTURE", name, reason, "correct the key that it names")


def _check_grouping_keys(cfg: CfgNode) -> Problem | None:
    """Check that exactly one of the number of groups and the channels per group is set."""
    keys = cfg.MODEL.GROUP_NORM
    count, width = "MODEL.GROUP_NORM.NUM_GROUPS", "MODEL.GROUP_NORM.DIM_PER_GP"
    # 32 is the default of NUM_GROUPS, so DIM_PER_GP may be set without resetting it
    if keys.DIM_PER_GP > 0 and keys.NUM_GROUPS not in (-1, 32):
        reason = f"{count} is also set, to {keys.NUM_GROUPS}, and only one of them can be used"
        return Problem(width, keys.DIM_PER_GP, reason, "set one of them to -1")
    if keys.DIM_PER_GP < 1 and keys.NUM_GROUPS < 1:
        return Problem(count, keys.NUM_GROUPS, f"{width} is not set either", "set one of them")
    return None


def _check_batch_norm(cfg: CfgNode, model: nn.Module, num_gpus: int) -> Iterator[Problem]:
    """Check that trained BatchNorm sees more than one image, and that SyncBN has a GPU."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        synchronized = "Sync" in type(module).__name__
        if synchronized and cfg.MODEL.DEVICE == "cpu":
            reason = f"{name} is SyncBatchNorm, which PyTorch supports on GPUs only"
            fix = "train on a GPU, or use GN, FrozenBN or BN instead of SyncBN"
            yield Problem("MODEL.DEVICE", "cpu", reason, fix)
            return
        images = images_per_pass(cfg, num_gpus) * (num_gpus if synchronized else 1)
        if images <= 1:
            reason = f"{name} is BatchNorm and would compute its statistics from a single image"
            fix = "use a larger batch, or GN or FrozenBN instead of BN"
            yield Problem("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, reason, fix)
            return


def _check_scratch(cfg: CfgNode, model: nn.Module) -> Iterator[Problem]:
    """Check that training from scratch freezes nothing and does not use FrozenBN."""
    keys = cfg.MODEL
    backbone = getattr(model, "backbone", model)
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    if frozen:
        reason = (
            f"MODEL.WEIGHTS is empty, so {len(frozen)} frozen tensors, such as {frozen[0]}, would "
            "keep their random values (this mistake in Detectron gave 36.2 instead of 39.5 AP)"
        )
        freeze_at = keys.BACKBONE.FREEZE_AT
        fix = "set MODEL.BACKBONE.FREEZE_AT 0"
        yield Problem("MODEL.BACKBONE.FREEZE_AT", freeze_at, reason, fix)
    if backbone_norm(cfg) == "FrozenBN" and re.search("resnet|vgg", keys.BACKBONE.NAME):
        reason = (
            "MODEL.WEIGHTS is empty, so FrozenBN has no statistics to normalize with, and "
            "training would diverge"
        )
        key = f"MODEL.{backbone_section(cfg)}.NORM"
        yield Problem(key, "FrozenBN", reason, "set it to GN, or set weights")
