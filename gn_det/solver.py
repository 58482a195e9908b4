"""Weight decay of gamma and beta, their learning rate, and that of the backbone."""

import logging
from itertools import product

from detectron2 import solver
from detectron2.config import CfgNode
from torch import nn
from torch.optim import Optimizer

from .config import is_pretraining
from .modeling.parts import TRUNK, part_of

NORM_TYPES = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Detectron2's optimizer, with the paper's weight decay on every norm parameter.

    That is `SOLVER.WEIGHT_DECAY_NORM` in a detector (Section 4.2), and in pretraining
    `SOLVER.WEIGHT_DECAY`, as on all weights (Section 4.1). Their learning rate is multiplied by
    `SOLVER.NORM_LR_FACTOR`, and that of all that was pretrained by `SOLVER.BACKBONE_MULTIPLIER`.
    """
    keys = cfg.SOLVER
    decay = keys.WEIGHT_DECAY if is_pretraining(cfg) else keys.WEIGHT_DECAY_NORM
    optimizer = solver.build_optimizer(cfg, model)
    return regroup(optimizer, model, decay, keys.NORM_LR_FACTOR, keys.BACKBONE_MULTIPLIER)


def images_per_pass(cfg: CfgNode, num_gpus: int) -> float:
    """Images that go through the model at once on each GPU, by Detectron2's rule of scaling."""
    gpus = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_gpus
    return cfg.SOLVER.IMS_PER_BATCH / gpus / cfg.SOLVER.ACCUMULATE_ITERS


def is_norm(module: nn.Module) -> bool:
    """Whether a module's own parameters are gamma and beta: a norm of PyTorch's, or so called."""
    return isinstance(module, NORM_TYPES) or type(module).__name__.endswith("Norm")


def regroup(
    optimizer: Optimizer,
    model: nn.Module,
    norm_decay: float,
    norm_factor: float = 1.0,
    backbone_factor: float = 1.0,
) -> Optimizer:
    """Give norm parameters their weight decay, and them and the backbone their learning rates.

    The paper finds zero decay "important for good detection results" (Section 4.2). Detectron2 lets
    `WEIGHT_DECAY_BIAS` win over `WEIGHT_DECAY_NORM`, and so decays beta when biases are decayed;
    beta is a norm parameter first. One line a group is logged.

    Args:
        optimizer: not stepped yet; its parameter groups are replaced.
        norm_decay: of every norm parameter, whatever group it came in.
        norm_factor: what norm parameters' learning rates are multiplied by.
        backbone_factor: the same of the ResNet, and of its res5 where a RoI head has that. FPN,
            which starts at random, is not slowed.
    """
    norm = _norm_parameters(model)
    # At one rate they stay in one group, as in the optimizers of earlier checkpoints
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
    """One line for each of the optimizer's parameter groups."""
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
    return {id(p) for name, p in model.named_parameters() if part_of(name) in TRUNK}
