"""Hooks: stopping on a signal, evaluation that survives a stop, and records of the run."""

import json
import logging
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..files import write_whole
from .metrics_file import cut_metrics, read_metrics
from .run_record import (
    RECORD,
    categories_of,
    count_parameters,
    device_name,
    git_commit,
    peak_memory_mib,
    versions,
)
from .train_step import anywhere

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a second signal is the first one, handed on by another process as well
ECHO = 1.0


class StopOnSignal(HookBase):
    """On SIGINT or SIGTERM finishes the iteration, saves, and leaves with the usual exit code.

    An evaluation is cut off, and a second signal stops at once, without saving. The place of this
    hook is after those that belong to the iteration, and before the evaluation; what fails from
    there on does not cost the iteration either.

    Args:
        writers: Detectron2's, which what was measured is written by before it is saved.

    Raises:
        SystemExit: with 128 and the signal's number.
    """

    def __init__(self, checkpointer: Checkpointer, writers: Sequence[EventWriter]) -> None:
        self._checkpointer, self._writers = checkpointer, writers
        self._signal = 0
        self._received = 0.0
        self._agreed = False
        # Whether a signal has to wait, and the iteration that has ended if none has begun since
        self._busy = False
        self._ended: int | None = None
        self._before: dict[int, Any] = {}

    def before_train(self) -> None:
        # Python lets no other thread set them
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def before_step(self) -> None:
        self._busy, self._ended = True, None

    def after_step(self) -> None:
        self._ended = self.trainer.iter
        at_end = self._ended + 1 >= self.trainer.max_iter
        # At the end metrics and the last checkpoint are still to be written
        self._busy = at_end
        self._agreed = anywhere(bool(self._signal))
        if self._agreed:
            # Of several processes perhaps another one was told
            self._signal = self._signal or signal.SIGTERM
            if not at_end:
                self._leave()

    def after_train(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        try:
            if self._ended is not None and self._ended + 1 < self.trainer.max_iter:
                self._save(self._ended)
            elif self._signal:
                self._leave()  # the last checkpoint is there, and the evaluation is left out
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _save(self, iteration: int) -> None:
        self.trainer.iter = iteration
        for writer in self._writers:
            writer.write()
        self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        if self._agreed:
            # Whoever leaves first takes the others along, and the main process has to write
            comm.synchronize()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self._signal and now - self._received > ECHO
        if not self._signal:
            self._signal, self._received = number, now
        if again:
            self._ended = None
        if again or not self._busy:
            self._leave()
        logging.getLogger(__name__).warning("Asked to stop: at the end of this iteration")

    def _leave(self) -> None:
        raise SystemExit(128 + self._signal)


# The scalar that tells that an evaluation has come to its end
EVALUATED = "eval_seconds"


class Evaluation(HookBase):
    """Detectron2's evaluation, which is made up for if a stop has cut it off.

    Its numbers are written before the next iteration, since no checkpoint holds them.

    Args:
        hook: Detectron2's.
        period: iterations from one evaluation to the next, 0 for one at the end alone.
        folder: the `OUTPUT_DIR`.
        writers: Detectron2's, of `metrics.json`; none but in the main process.
    """

    def __init__(
        self, hook: HookBase, period: int, folder: str, writers: list[EventWriter]
    ) -> None:
        self._hook, self._period, self._folder, self._writers = hook, period, folder, writers
        self._unwritten = False

    def before_train(self) -> None:
        self._hook.trainer = self.trainer
        trainer, last = self.trainer, self.trainer.start_iter - 1
        if not self._due(last) or comm.all_gather(EVALUATED in self._measured(last))[0]:
            return
        # As at the end of that iteration, whose checkpoint was written before its evaluation
        trainer.iter = trainer.storage.iter = last
        self.after_step()
        self.before_step()
        trainer.iter = trainer.storage.iter = last + 1
        if comm.is_main_process():
            cut_metrics(self._folder, last, self._measured(last))

    def before_step(self) -> None:
        if self._unwritten:
            self._unwritten = False
            for writer in self._writers:
                writer.write()

    def after_step(self) -> None:
        start = time.perf_counter()
        self._hook.after_step()
        if self._due(self.trainer.iter):
            seconds = time.perf_counter() - start
            self.trainer.storage.put_scalar(EVALUATED, seconds, smoothing_hint=False)
            self._unwritten = True

    def after_train(self) -> None:
        # Detectron2's would evaluate a training that its last iteration has failed, too
        if self.trainer.iter >= self.trainer.max_iter:
            self._hook.after_train()

    def _due(self, iteration: int) -> bool:
        """Whether an evaluation follows on an iteration, other than the one after training."""
        if self._period <= 0 or not 0 <= iteration < self.trainer.max_iter - 1:
            return False
        return (iteration + 1) % self._period == 0

    def _measured(self, iteration: int) -> dict[str, Any]:
        """All that `metrics.json` holds of an iteration."""
        found = [content for _, content in read_metrics(self._folder)]
        of_it = [content for content in found if content.get("iteration") == iteration]
        return {key: value for content in of_it for key, value in content.items()}


class MemoryRecorder(HookBase):
    """Writes `peak_memory_mib` into the metrics.

    Args:
        device: as in `MODEL.DEVICE`.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def after_step(self) -> None:
        memory = peak_memory_mib(self._device)
        if memory is not None:
            self.trainer.storage.put_scalar("peak_memory_mib", memory, smoothing_hint=False)


class RunRecorder(HookBase):
    """Writes `run.json` once the run is at its end.

    It holds the seed, device, categories, parameter counts, versions and git commit. It is
    written after the last evaluation, so that it also says that the other outputs are whole.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._path = Path(cfg.OUTPUT_DIR) / RECORD

    def before_train(self) -> None:
        self._path.unlink(missing_ok=True)

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # stopped before its end
        record = {
            "seed": self._cfg.SEED,
            "device": device_name(self._cfg.MODEL.DEVICE),
            "categories": categories_of(self._cfg.DATASETS.TRAIN[0]),
            "parameters": count_parameters(self.trainer.model),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        with write_whole(self._path) as file:
            file.write(json.dumps(record, indent=2) + "\n")
