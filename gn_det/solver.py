"""An optimizer with separate settings for norm parameters and for the backbone."""

import logging
from itertools import product

from detectron2 import solver
from detectron2.config import CfgNode
from torch import nn
from torch.optim import Optimizer

from .config import is_pretraining
from .modeling.parts import BACKBONE_PARTS, part_of

NORM_TYPES = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build Detectron2's optimizer, with the paper's weight decay on every norm parameter.

    The weight decay of gamma and beta is `SOLVER.WEIGHT_DECAY_NORM` in a detector (Section 4.2),
    and `SOLVER.WEIGHT_DECAY` in pretraining (Section 4.1). `SOLVER.NORM_LR_FACTOR` multiplies the
    learning rate of norm parameters, and `SOLVER.BACKBONE_MULTIPLIER` that of the backbone.

    Args:
        cfg: a config with gn_det's keys.
        model: the model whose parameters are optimized.

    Returns:
        the optimizer; frozen parameters are not in it.
    """
    keys = cfg.SOLVER
    decay = keys.WEIGHT_DECAY if is_pretraining(cfg) else keys.WEIGHT_DECAY_NORM
    optimizer = solver.build_optimizer(cfg, model)
    return regroup(optimizer, model, decay, keys.NORM_LR_FACTOR, keys.BACKBONE_MULTIPLIER)


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
    backbone_factor: float = 1.0,
) -> Optimizer:
    """Regroup parameters to set the weight decay of norms and the rates of norms and backbone.

    The paper finds zero decay of gamma and beta "important for good detection results" (Section
    4.2). In Detectron2, `WEIGHT_DECAY_BIAS` overrides `WEIGHT_DECAY_NORM` for beta; here it does
    not. One line per parameter group is logged.

    Args:
        optimizer: before its first step; its parameter groups are replaced.
        model: the model whose parameters it optimizes.
        norm_decay: weight decay of every norm parameter.
        norm_factor: multiplies the learning rate of norm parameters.
        backbone_factor: multiplies the learning rate of the ResNet, including res5 in the RoI head
            of C4 models. FPN is randomly initialized and keeps its rate.

    Returns:
        `optimizer`.
    """
    norm = _norm_parameters(model)
    # Without a factor, keep the groups of older checkpoints, so that these can be resumed
    backbone = _backbone_parameters(model) if backbone_factor != 1 else set()
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group, of_backbone, of_norm in product(groups, (False, True), (False, True)):
        kind = of_backbone, of_norm
        params = [p for p in group["params"] if (id(p) in backbone, id(p) in norm) == kind]
        if params:
            own = {"params": params, "lr": group["lr"]}
            if of_backbone:
                own["lr"] *= backbone_factor
            if of_norm:
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


def _backbone_parameters(model: nn.Module) -> set[int]:
    return {id(p) for name, p in model.named_parameters() if part_of(name) in BACKBONE_PARTS}
