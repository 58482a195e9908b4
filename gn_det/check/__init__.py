"""Checks of a config before training; they report all problems at once."""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.utils import comm

from .evaluation import check_evaluation
from .layers import check_layers
from .norm_keys import check_builders, check_implementation, check_norm_keys
from .problem import ConfigError, Problem
from .schedule import check_batch, check_classes, check_solver, check_steps
from .values import check_values
from .weights import check_weights, grouping_mismatch

__all__ = ["ConfigError", "Problem", "check_config", "log_warnings", "refuse_problems"]


def check_config(cfg: CfgNode, num_gpus: int | None = None) -> None:
    """Refuse a config that would fail or train wrongly, and warn about suspicious settings.

    Files that the config names are read if they exist. Missing files are not reported here: the
    trainer does that. The model is built on PyTorch's meta device, in a fraction of a second.

    Args:
        cfg: a config that `gn_det.add_gn_config` has been called on.
        num_gpus: total number of GPUs on all machines; defaults to that of the current job.

    Raises:
        ConfigError: an `InputError` whose `problems` lists every `Problem` that was found.
    """
    refuse_problems(cfg, num_gpus)
    log_warnings(cfg)


def refuse_problems(cfg: CfgNode, num_gpus: int | None = None) -> None:
    """Raise a `ConfigError` as `check_config` does, without logging warnings.

    Args:
        cfg: as in `check_config`.
        num_gpus: as in `check_config`.

    Raises:
        ConfigError: if there is any problem.
    """
    problems = list(_find_problems(cfg, num_gpus or comm.get_world_size()))
    if problems:
        raise ConfigError(problems)


def log_warnings(cfg: CfgNode) -> None:
    """Log a warning for each setting that is valid but probably not intended."""
    if warning := grouping_mismatch(cfg):
        logging.getLogger(__name__).warning(warning)


def _find_problems(cfg: CfgNode, num_gpus: int) -> Iterator[Problem]:
    # The other checks compute with these values
    if wrong := list(check_values(cfg)):
        yield from wrong
        return
    yield from check_steps(cfg)
    yield from check_batch(cfg, num_gpus)
    yield from check_solver(cfg)
    yield from check_classes(cfg)
    yield from check_norm_keys(cfg)
    yield from check_builders(cfg)
    yield from check_implementation(cfg)
    yield from check_evaluation(cfg)
    yield from check_weights(cfg)
    yield from check_layers(cfg, num_gpus)
