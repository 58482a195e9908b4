"""A hook that keeps the model with the best metric."""

import logging
import math
from pathlib import Path

from detectron2.engine import HookBase

from ..checkpoint.checkpointer import BEST, StrictCheckpointer
from ..evaluation.metrics_file import metrics_of
from .hooks import EVALUATED


class BestModel(HookBase):
    """Saves the model as `model_best.pth` whenever a metric is higher than in all evaluations.

    A resumed run keeps the best model of the iterations before. Unlike with Detectron2's
    `BestCheckpointer`, training never resumes from this file. Register the hook after that of the
    evaluation, in the main process.

    Args:
        checkpointer: saves the model, in `OUTPUT_DIR`.
        metric: such as "segm/AP"; larger values are better.
    """

    def __init__(self, checkpointer: StrictCheckpointer, metric: str) -> None:
        self._checkpointer, self._metric = checkpointer, metric
        self._best = -math.inf

    def before_train(self) -> None:
        folder, start = Path(self._checkpointer.save_dir), self.trainer.start_iter
        if (folder / BEST).is_file():
            earlier = [line for line in metrics_of(folder) if line["iteration"] < start]
            self._best = max(
                (line[self._metric] for line in earlier if self._metric in line), default=-math.inf
            )
        # An interrupted evaluation has just been repeated
        self._compare(start - 1)

    def after_step(self) -> None:
        self._compare(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._compare(self.trainer.iter)

    def _compare(self, iteration: int) -> None:
        latest = self.trainer.storage.latest()
        value, evaluated_at = latest.get(self._metric, (math.nan, -1))
        if evaluated_at == iteration and value > self._best:
            self._best = value
            self._checkpointer.save_best(min(iteration, self.trainer.max_iter - 1))
        elif evaluated_at < 0 <= iteration and latest.get(EVALUATED, (0, -1))[1] == iteration:
            known = ", ".join(sorted(name for name in latest if "/AP" in name)) or "none"
            logging.getLogger(__name__).warning(
                f"TEST.BEST_METRIC {self._metric}: the evaluation has no such metric, so {BEST} is "
                f"not saved; set it to one of: {known}"
            )
