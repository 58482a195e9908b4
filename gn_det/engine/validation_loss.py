"""A hook that logs the training losses on the validation set."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.loader import seeded

PREFIX = "validation_"


class ValidationLoss(HookBase):
    """Adds the losses on the test sets to the metrics, as `validation_total_loss` and the like.

    They are means over images, without augmentation and at the sizes of evaluation. RoIs are
    sampled with the same seed each time, and neither the weights nor the random state of the
    training change.

    Args:
        cfg: the config, whose `TEST.EVAL_PERIOD` is used.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg

    def after_step(self) -> None:
        done, period = self.trainer.iter + 1, self._cfg.TEST.EVAL_PERIOD
        if done == self.trainer.max_iter or (period > 0 and done % period == 0):
            for name, loss in validation_losses(self._cfg, self.trainer.model).items():
                self.trainer.storage.put_scalar(f"{PREFIX}{name}", loss, smoothing_hint=False)


def validation_losses(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Mean losses of a detector on the images of `DATASETS.TEST`; in the main process only.

    Args:
        cfg: its config.
        model: a `GeneralizedRCNN`, perhaps wrapped for several processes.
    """
    size = cfg.INPUT.MIN_SIZE_TEST
    resize = ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[resize])
    detector = getattr(model, "module", model)
    losses: dict[str, list[float]] = defaultdict(list)
    with _computing_losses(detector), EventStorage(), torch.no_grad():
        for name in cfg.DATASETS.TEST:
            for batch in build_detection_test_loader(cfg, name, mapper=mapper):
                # As many images as there are passes: the mean over equal images is that of one
                for key, loss in detector([*batch] * cfg.SOLVER.ACCUMULATE_ITERS).items():
                    losses[key].append(float(loss))
    gathered = comm.gather(dict(losses))
    if not gathered:
        return {}
    means = {
        key: mean(loss for part in gathered for loss in part.get(key, []))
        for key in dict.fromkeys(key for part in gathered for key in part)
    }
    return {"total_loss": sum(means.values()), **means} if means else {}


@contextmanager
def _computing_losses(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode inside the block, but its BatchNorm into evaluation mode."""
    before = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    try:
        with seeded(0):
            yield
    finally:
        for module, training in before.items():
            module.training = training
