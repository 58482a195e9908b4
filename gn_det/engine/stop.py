"""Stopping a training from outside, at an iteration's end and with a checkpoint."""

import logging
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter

from .step import anywhere

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        self._in_step = False
        self._savable = False  # whether an iteration has ended, and the next not begun
        self._before: dict[int, Any] = {}

    def before_train(self) -> None:
        # Python lets no other thread set them
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def before_step(self) -> None:
        self._in_step, self._savable = True, False

    def after_step(self) -> None:
        self._in_step, self._savable = False, True
        if anywhere(bool(self._signal)):
            # Of several processes perhaps another one was told
            self._signal = self._signal or signal.SIGTERM
            if not self._at_end():
                self._leave()

    def after_train(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._savable and not self._at_end():
            for writer in self._writers:
                writer.write()
            self._checkpointer.save(f"model_{self.trainer.iter:07d}")
        elif self._signal and self._at_end():
            self._leave()  # the last checkpoint is there, and the evaluation is left out

    def _at_end(self) -> bool:
        return self.trainer.iter + 1 >= self.trainer.max_iter

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self._signal = bool(self._signal), number
        if again:
            self._savable = False
        if again or not self._in_step:
            self._leave()
        logging.getLogger(__name__).warning("Asked to stop: at the end of this iteration")

    def _leave(self) -> None:
        raise SystemExit(128 + self._signal)
