"""An optimizer with separate settings for norm parameters, the backbone and the mask head."""

import logging
from collections import defaultdict
from collections.abc import Mapping

from detectron2 import solver
from detectron2.config import CfgNode
from torch import nn
from torch.optim import Optimizer

from .config import is_clips, is_pretraining
from .modeling.norm import parts_with_norm
from .modeling.parts import BACKBONE_PARTS, MASK_HEAD_PARTS, part_of

# Channels of the mask head in published recipes, and their learning rate at 16 images per batch
WIDTH, MASK_RATE = 256, 0.02
# Sum of the learning rates over all iterations with which a mask head of that width learns
ENOUGH = 10.0

NORM_TYPES = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build Detectron2's optimizer, with the paper's weight decay on every norm parameter.

    The weight decay of gamma and beta is `SOLVER.WEIGHT_DECAY_NORM` in a detector (Section 4.2) and
    for clips, and `SOLVER.WEIGHT_DECAY` in pretraining (Section 4.1). `SOLVER.NORM_LR_FACTOR`
    multiplies the learning rate of norm parameters, `SOLVER.BACKBONE_MULTIPLIER` that of the
    backbone, and `SOLVER.MASK_HEAD_MULTIPLIER` that of the mask head.

    Args:
        cfg: a config with gn_det's keys.
        model: the model whose parameters are optimized.

    Returns:
        the optimizer; frozen parameters are not in it.
    """
    keys = cfg.SOLVER
    decays = is_pretraining(cfg) and not is_clips(cfg)
    decay = keys.WEIGHT_DECAY if decays else keys.WEIGHT_DECAY_NORM
    optimizer = solver.build_optimizer(cfg, model)
    return regroup(optimizer, model, decay, keys.NORM_LR_FACTOR, part_factors(cfg))


def part_factors(cfg: CfgNode) -> dict[str, float]:
    """Factor on the learning rate of each part of the model, as `part_of` names it.

    The factor 1 is left out.
    """
    factors = dict.fromkeys(BACKBONE_PARTS, cfg.SOLVER.BACKBONE_MULTIPLIER)
    factors |= dict.fromkeys(MASK_HEAD_PARTS, mask_head_factor(cfg))
    return {part: factor for part, factor in factors.items() if factor != 1}


def mask_head_factor(cfg: CfgNode) -> float:
    """The factor `SOLVER.MASK_HEAD_MULTIPLIER`, or the one that is chosen if it is 0."""
    if cfg.SOLVER.MASK_HEAD_MULTIPLIER:
        return cfg.SOLVER.MASK_HEAD_MULTIPLIER
    has_norm = cfg.MODEL.ROI_MASK_HEAD.NORM and "mask head" in parts_with_norm(cfg)
    return fitted_mask_head_factor(cfg) if has_norm else 1.0


def fitted_mask_head_factor(cfg: CfgNode) -> float:
    """A factor with which a randomly initialized mask head learns within the schedule.

    A step changes a logit by a sum over all channels, so a narrow head needs `WIDTH` / channels
    times the rate. What a head has learned depends on the sum of its rates over all iterations: if
    a schedule falls short of `ENOUGH`, the rate is raised, at most to `MASK_RATE`. The factor is 1
    in every published recipe.
    """
    keys = cfg.SOLVER
    rate = max(keys.BASE_LR, min(MASK_RATE, ENOUGH / keys.MAX_ITER))
    width = max(WIDTH / cfg.MODEL.ROI_MASK_HEAD.CONV_DIM, 1.0)
    return float(f"{width * rate / keys.BASE_LR:.4g}") if keys.BASE_LR > 0 else 1.0


def images_per_pass(cfg: CfgNode, num_gpus: int) -> float:
    """Number of images in one forward pass on each GPU.

    Args:
        cfg: a config with gn_det's keys.
        num_gpus: total number of GPUs. It is not used if `SOLVER.REFERENCE_WORLD_SIZE` is set:
            Detectron2 then scales the batch with the number of GPUs.
    """
    gpus = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_gpus
    return cfg.SOLVER.IMS_PER_BATCH / gpus / cfg.SOLVER.ACCUMULATE_ITERS


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer: one of PyTorch's, or one whose class name ends in Norm."""
    return isinstance(module, NORM_TYPES) or type(module).__name__.endswith("Norm")


def regroup(
    optimizer: Optimizer,
    model: nn.Module,
    norm_decay: float,
    norm_factor: float = 1.0,
    factors: Mapping[str, float] | None = None,
) -> Optimizer:
    """Regroup parameters to set the weight decay of norms and the rates of norms and parts.

    The paper finds zero decay of gamma and beta "important for good detection results" (Section
    4.2). In Detectron2, `WEIGHT_DECAY_BIAS` overrides `WEIGHT_DECAY_NORM` for beta; here it does
    not. One line per parameter group is logged.

    Args:
        optimizer: before its first step; its parameter groups are replaced.
        model: the model whose parameters it optimizes.
        norm_decay: weight decay of every norm parameter.
        norm_factor: multiplies the learning rate of norm parameters.
        factors: {part, as `part_of` names it: factor on its learning rate}. Without any, the
            groups are those of older checkpoints, so that these can be resumed.

    Returns:
        `optimizer`.
    """
    norm, factors = _norm_parameters(model), factors or {}
    rates = {id(p): factors.get(part_of(name), 1.0) for name, p in model.named_parameters()}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        kinds: dict[tuple[float, bool], list] = defaultdict(list)
        for parameter in group["params"]:
            kinds[rates[id(parameter)], id(parameter) in norm].append(parameter)
        for (factor, is_norm_), params in sorted(kinds.items(), key=lambda k: (k[0][0] != 1, k[0])):
            own = {"params": params, "lr": group["lr"] * factor}
            if is_norm_:
                own["lr"] *= norm_factor
                own["weight_decay"] = norm_decay
            optimizer.add_param_group({**group, **own})
    for line in describe_groups(optimizer, model):
        logging.getLogger(__name__).info(f"Optimizer group: {line}")
    return optimizer


def describe_groups(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Describe each parameter group in one line: tensors, learning rate and weight decay."""
    norm = _norm_parameters(model)
    return [
        f"{len(group['params'])} {'norm' if id(group['params'][0]) in norm else 'other'} tensors, "
        f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]


def _norm_parameters(model: nn.Module) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        if is_norm(module)
        for parameter in module.parameters(recurse=False)
    }
