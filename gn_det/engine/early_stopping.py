"""A hook that ends training when a metric has stopped improving."""

import logging
import math
from collections.abc import Sequence

from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer

from ..evaluation.metrics_file import metrics_of
from .train_step import TrainingEnd, any_process


class EarlyStopping(HookBase):
    """Ends training after some evaluations in a row without a better value of a metric.

    The last model is saved as `model_final.pth`, as after `SOLVER.MAX_ITER` iterations. A resumed
    run counts the evaluations before it, so it ends at the same iteration. Register the hook after
    that of the evaluation and before those that save checkpoints, in all processes.

    Args:
        folder: `OUTPUT_DIR`, with the metrics of earlier iterations.
        metric: such as "segm/AP"; larger values are better.
        patience: the number of evaluations.
        savers: the hooks that save checkpoints.
    """

    def __init__(
        self, folder: str, metric: str, patience: int, savers: Sequence[PeriodicCheckpointer]
    ) -> None:
        self._folder, self._metric, self._patience = folder, metric, patience
        self._savers = savers
        self._values: list[float] = []
        self._ended = False

    def before_train(self) -> None:
        start = self.trainer.start_iter
        lines = metrics_of(self._folder) if start else []
        earlier = [line for line in lines if line["iteration"] < start]
        self._values = [line[self._metric] for line in earlier if self._metric in line]
        self._end_if_exhausted(start)

    def before_step(self) -> None:
        if self._ended:
            raise TrainingEnd

    def after_step(self) -> None:
        self._values += self._evaluated(self.trainer.iter)
        self._end_if_exhausted(self.trainer.iter + 1)

    def _evaluated(self, iteration: int) -> list[float]:
        """The value of the metric, if the model was evaluated after this iteration."""
        value, evaluated_at = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
        return [value] if evaluated_at == iteration >= 0 else []

    def _end_if_exhausted(self, iteration: int) -> None:
        """End training before this iteration, if the metric has not improved for too long."""
        values = [-math.inf if math.isnan(value) else value for value in self._values]
        # The first of equal values is the best
        since = len(values) - 1 - values.index(max(values)) if values else 0
        # Only the main process evaluates
        if not any_process(since >= self._patience) or iteration >= self.trainer.max_iter:
            return
        logging.getLogger(__name__).info(
            f"{self._metric} has not improved for {since} evaluations (SOLVER.PATIENCE): training "
            f"ends after {iteration} iterations"
        )
        self._ended = True
        # For the hooks that act on the last iteration
        self.trainer.max_iter = iteration
        for saver in self._savers:
            saver.max_iter = iteration
