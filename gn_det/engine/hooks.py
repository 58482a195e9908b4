"""Hooks that stop on a signal, repeat an interrupted evaluation, and record the run."""

import gc
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

from ..evaluation.metrics_file import drop_metrics_from, read_metrics
from ..files import write_whole
from .run_record import (
    RECORD,
    categories_of,
    count_parameters,
    device_name,
    git_commit,
    peak_memory_mib,
    versions,
)
from .train_step import any_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a second signal counts as the first one, forwarded by a parent process
ECHO = 1.0


class FreezeObjects(HookBase):
    """Exempt the objects that exist before training from Python's garbage collection.

    On a GPU a training step waits for Python, and each full collection looks at every object.
    """

    def before_train(self) -> None:
        gc.collect()
        gc.freeze()

    def after_train(self) -> None:
        gc.unfreeze()


class StopOnSignal(HookBase):
    """On SIGINT or SIGTERM, finish the iteration, save a checkpoint and exit.

    An evaluation is aborted at once. A second signal exits at once, without a checkpoint. Register
    this hook after the hooks that belong to the iteration, and before the evaluation hook: then a
    failure in a later hook also leads to a checkpoint of the iteration.

    Args:
        checkpointer: saves the checkpoint, `model_<iteration>.pth`.
        writers: Detectron2's writers, which write pending metrics before the checkpoint.

    Raises:
        SystemExit: with exit code 128 plus the number of the signal.
    """

    def __init__(self, checkpointer: Checkpointer, writers: Sequence[EventWriter]) -> None:
        self._checkpointer, self._writers = checkpointer, writers
        self._signal = 0
        self._received = 0.0
        self._agreed = False
        # Whether a signal must wait, and the finished iteration if the next one has not started
        self._busy = False
        self._ended: int | None = None
        self._before: dict[int, Any] = {}

    def before_train(self) -> None:
        # Python allows signal handlers to be set in the main thread only
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def before_step(self) -> None:
        self._busy, self._ended = True, None

    def after_step(self) -> None:
        self._ended = self.trainer.iter
        at_end = self._ended + 1 >= self.trainer.max_iter
        # After the last iteration, metrics and the final checkpoint are still to be written
        self._busy = at_end
        self._agreed = any_process(bool(self._signal))
        if self._agreed:
            # Perhaps only another process received the signal
            self._signal = self._signal or signal.SIGTERM
            if not at_end:
                self._exit()

    def after_train(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        try:
            if self._ended is not None and self._ended + 1 < self.trainer.max_iter:
                self._save(self._ended)
            elif self._signal:
                self._exit()  # the final checkpoint exists; skip the evaluation
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _save(self, iteration: int) -> None:
        self.trainer.iter = iteration
        for writer in self._writers:
            writer.write()
        self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        if self._agreed:
            # The first process to exit ends the others, so wait until the main process has saved
            comm.synchronize()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        second = self._signal and now - self._received > ECHO
        if not self._signal:
            self._signal, self._received = number, now
        if second:
            self._ended = None
        if second or not self._busy:
            self._exit()
        logging.getLogger(__name__).warning("Stopping at the end of this iteration")

    def _exit(self) -> None:
        raise SystemExit(128 + self._signal)


# The metric that shows that an evaluation has finished
EVALUATED = "eval_seconds"


class Evaluation(HookBase):
    """Detectron2's evaluation, repeated after resuming if it was interrupted.

    Its metrics are written before the next iteration, since checkpoints do not contain them.

    Args:
        hook: Detectron2's `EvalHook`.
        period: iterations between evaluations; 0 evaluates only after training.
        folder: `OUTPUT_DIR`.
        writers: the writers of `metrics.json`, in the main process; else empty.
    """

    def __init__(
        self, hook: HookBase, period: int, folder: str, writers: list[EventWriter]
    ) -> None:
        self._hook, self._period, self._folder, self._writers = hook, period, folder, writers
        self._unwritten = False

    def before_train(self) -> None:
        self._hook.trainer = self.trainer
        trainer, last = self.trainer, self.trainer.start_iter - 1
        if not self._due(last) or comm.all_gather(EVALUATED in self._metrics_of(last))[0]:
            return
        # The checkpoint of an iteration is written before its evaluation, so repeat that now
        trainer.iter = trainer.storage.iter = last
        self.after_step()
        self.before_step()
        trainer.iter = trainer.storage.iter = last + 1
        if comm.is_main_process():
            drop_metrics_from(self._folder, last, self._metrics_of(last))

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
        # Detectron2's hook would also evaluate if the last iteration failed
        if self.trainer.iter >= self.trainer.max_iter:
            self._hook.after_train()

    def _due(self, iteration: int) -> bool:
        """Whether an evaluation follows an iteration, except for the last one."""
        if self._period <= 0 or not 0 <= iteration < self.trainer.max_iter - 1:
            return False
        return (iteration + 1) % self._period == 0

    def _metrics_of(self, iteration: int) -> dict[str, Any]:
        """The metrics of an iteration in `metrics.json`, from all of its lines."""
        lines = [content for _, content in read_metrics(self._folder)]
        matching = [content for content in lines if content.get("iteration") == iteration]
        return {key: value for content in matching for key, value in content.items()}


class MemoryRecorder(HookBase):
    """Adds `peak_memory_mib` to the metrics of each iteration.

    Args:
        device: the value of `MODEL.DEVICE`.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def after_step(self) -> None:
        memory = peak_memory_mib(self._device)
        if memory is not None:
            self.trainer.storage.put_scalar("peak_memory_mib", memory, smoothing_hint=False)


class RunRecorder(HookBase):
    """Writes `run.json` after training.

    The file contains the seed, device, categories, parameter counts, versions and git commit. It is
    written after the last evaluation, so its existence shows that all other outputs are complete.

    Args:
        cfg: the config of the run.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._path = Path(cfg.OUTPUT_DIR) / RECORD

    def before_train(self) -> None:
        self._path.unlink(missing_ok=True)

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # training was interrupted
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
