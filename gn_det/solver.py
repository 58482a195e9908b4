"""Weight decay of norm parameters: gamma and beta get `SOLVER.WEIGHT_DECAY_NORM`, always."""

import logging

from torch import nn
from torch.optim import Optimizer

NORM_TYPES = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def set_norm_weight_decay(optimizer: Optimizer, model: nn.Module, weight_decay: float) -> Optimizer:
    """Give every norm parameter of `model` this weight decay, whatever group it came in.

    The paper finds zero "important for good detection results" (Section 4.2). Detectron2 lets
    `WEIGHT_DECAY_BIAS` win over `WEIGHT_DECAY_NORM`, and so decays beta when biases are decayed;
    beta is a norm parameter first. Learning rates stay as they are. One line a group is logged.

    Args:
        optimizer: not stepped yet; its parameter groups are replaced.
    """
    norm = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORM_TYPES)
        for parameter in module.parameters(recurse=False)
    }
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        ours = [p for p in group["params"] if id(p) in norm]
        rest = [p for p in group["params"] if id(p) not in norm]
        if rest:
            optimizer.add_param_group({**group, "params": rest})
        if ours:
            optimizer.add_param_group({**group, "params": ours, "weight_decay": weight_decay})
    for group in optimizer.param_groups:
        kind = "norm" if id(group["params"][0]) in norm else "other"
        logging.getLogger(__name__).info(
            f"Optimizer group: {len(group['params'])} {kind} tensors, "
            f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}"
        )
    return optimizer
