"""Checks of a config before anything is trained: all the mistakes in it, told at once."""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.utils import comm

from .layers import check_groups, check_layers
from .norm_keys import check_builders, check_implementation, check_norm_keys
from .problem import ConfigError, Problem
from .schedule import check_batch, check_classes, check_solver, check_steps
from .weights import check_weights, group_mismatch

__all__ = ["ConfigError", "Problem", "check_config"]


def check_config(cfg: CfgNode, num_gpus: int | None = None) -> None:
    """Refuse a config that would train wrongly, or not at all, where that can be known beforehand.

    Files that it names are looked into if they are on this machine; whether they are is for the
    trainer to check. The model is built without its tensors, in a fraction of a second.

    Args:
        cfg: a config that `gn_det.add_gn_config` has been called on.
        num_gpus: how many it will be trained on, in all; by default as many as train now.

    Raises:
        ConfigError: an `InputError` that lists every problem, each with key, value, why and mend.
    """
    problems = list(_find_problems(cfg, num_gpus or comm.get_world_size()))
    if problems:
        raise ConfigError(problems)
    if warning := group_mismatch(cfg):
        logging.getLogger(__name__).warning(warning)


def _find_problems(cfg: CfgNode, num_gpus: int) -> Iterator[Problem]:
    yield from check_steps(cfg)
    yield from check_batch(cfg, num_gpus)
    yield from check_solver(cfg)
    yield from check_classes(cfg)
    yield from check_norm_keys(cfg)
    yield from check_builders(cfg)
    yield from check_implementation(cfg)
    yield from check_weights(cfg)
    # The others need a model, however its norms are computed
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.GROUP_NORM.IMPL, cfg.MODEL.GROUP_NORM.RECOMPUTE = "native", "none"
    if problem := check_groups(cfg):
        yield problem
        # One group divides all channels
        keys = cfg.MODEL.GROUP_NORM
        keys.NUM_GROUPS, keys.DIM_PER_GP, keys.HEADS_NUM_GROUPS = 1, -1, -1
    yield from check_layers(cfg, num_gpus)
