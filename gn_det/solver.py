"""Weight decay and learning rate of norm parameters: gamma and beta get their own, always."""

import logging

from detectron2 import solver
from detectron2.config import CfgNode
from torch import nn
from torch.optim import Optimizer

from .config import is_pretraining

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
    `SOLVER.NORM_LR_FACTOR`.
    """
    keys = cfg.SOLVER
    decay = keys.WEIGHT_DECAY if is_pretraining(cfg) else keys.WEIGHT_DECAY_NORM
    optimizer = solver.build_optimizer(cfg, model)
    return set_norm_groups(optimizer, model, decay, keys.NORM_LR_FACTOR)


def images_per_pass(cfg: CfgNode, num_gpus: int) -> float:
    """Images that go through the model at once on each GPU, by Detectron2's rule of scaling."""
    gpus = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_gpus
    return cfg.SOLVER.IMS_PER_BATCH / gpus / cfg.SOLVER.ACCUMULATE_ITERS


def is_norm(module: nn.Module) -> bool:
    """Whether a module's own parameters are gamma and beta: a norm of PyTorch's, or so called."""
    return isinstance(module, NORM_TYPES) or type(module).__name__.endswith("Norm")


def set_norm_groups(
    optimizer: Optimizer, model: nn.Module, weight_decay: float, lr_factor: float = 1.0
) -> Optimizer:
    """Give every norm parameter of `model` this weight decay, whatever group it came in.

    The paper finds zero "important for good detection results" (Section 4.2). Detectron2 lets
    `WEIGHT_DECAY_BIAS` win over `WEIGHT_DECAY_NORM`, and so decays beta when biases are decayed;
    beta is a norm parameter first. One line a group is logged.

    Args:
        optimizer: not stepped yet; its parameter groups are replaced.
        lr_factor: what norm parameters' learning rates are multiplied by.
    """
    norm = _norm_parameters(model)
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        ours = [p for p in group["params"] if id(p) in norm]
        rest = [p for p in group["params"] if id(p) not in norm]
        if rest:
            optimizer.add_param_group({**group, "params": rest})
        if ours:
            own = {"lr": group["lr"] * lr_factor, "weight_decay": weight_decay}
            optimizer.add_param_group({**group, "params": ours, **own})
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
