"""Stopping a training from outside, at an iteration's end and with a checkpoint."""

import logging
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from .step import anywhere

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
