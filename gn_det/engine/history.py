"""What a training has measured, in `metrics.json` without gaps and doubles when it goes on."""

import json
import os
import time
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

METRICS = "metrics.json"
# The scalar that tells that an evaluation has come to its end
EVALUATED = "eval_seconds"


def cut_metrics(folder: str, iteration: int) -> list[dict[str, Any]]:
    """Take the lines of an iteration, and of those after it, off the end of `metrics.json`.

    Returns:
        them, as far as they can be read, in reverse order.
    """
    path, removed = Path(folder, METRICS), []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    while lines:
        content = _content(lines[-1])
        if content and content["iteration"] < iteration:
            break
        lines.pop()
        removed.append(content)
    if removed:
        # In its place: Detectron2's writer has it open, and goes on at its end
        os.truncate(path, sum(map(len, lines)))
    return [content for content in removed if content]


def _content(line: bytes) -> dict[str, Any]:
    """What a line holds; nothing if it was not written to its end."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) and "iteration" in content else {}


class Evaluation(HookBase):
    """Detectron2's evaluation, which is made up for if a stop has cut it off.

    Its numbers are written before the next iteration, since no checkpoint holds them.

    Args:
        hook: Detectron2's.
        period: iterations from one evaluation to the next, 0 for one at the end alone.
        folder: the `OUTPUT_DIR`.
        writers: Detectron2's, of `metrics.json` and others; none but in the main process.
    """

    def __init__(
        self, hook: HookBase, period: int, folder: str, writers: list[EventWriter]
    ) -> None:
        self._hook, self._period, self._folder, self._writers = hook, period, folder, writers
        self._unwritten = False

    def before_train(self) -> None:
        self._hook.trainer = self.trainer
        trainer, start = self.trainer, self.trainer.start_iter
        if start >= trainer.max_iter or not start or not self._due(start - 1):
            return
        last = cut_metrics(self._folder, start - 1) if comm.is_main_process() else []
        if not any(comm.all_gather(any(EVALUATED in line for line in last))):
            # As at the end of that iteration, whose checkpoint was written before its evaluation
            trainer.iter = trainer.storage.iter = start - 1
            self.after_step()
            self.before_step()
            trainer.iter = trainer.storage.iter = start
            last = cut_metrics(self._folder, start - 1) + last if comm.is_main_process() else []
        if last:
            whole = {key: value for line in reversed(last) for key, value in line.items()}
            with Path(self._folder, METRICS).open("a") as file:
                file.write(json.dumps(whole, sort_keys=True) + "\n")

    def before_step(self) -> None:
        if self._unwritten:
            self._unwritten = False
            for writer in self._writers:
                writer.write()

    def after_step(self) -> None:
        start = time.perf_counter()
        self._hook.after_step()
        # The last one is done after training, when the writers write anyway
        if self._due(self.trainer.iter) and self.trainer.iter + 1 < self.trainer.max_iter:
            seconds = time.perf_counter() - start
            self.trainer.storage.put_scalar(EVALUATED, seconds, smoothing_hint=False)
            self._unwritten = True

    def after_train(self) -> None:
        self._hook.after_train()

    def _due(self, iteration: int) -> bool:
        return self._period > 0 and (iteration + 1) % self._period == 0
