"""What a training has measured, in `metrics.json` without gaps and doubles when it goes on."""

import json
import time
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

METRICS = "metrics.json"
# The scalar that tells that an evaluation has come to its end
EVALUATED = "eval_seconds"


def read_metrics(folder: str) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of `metrics.json`, and what they hold: nothing, if not written to the end."""
    path = Path(folder, METRICS)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [(line, _content(line)) for line in lines]


def cut_metrics(folder: str, iteration: int, whole: dict[str, Any] | None = None) -> None:
    """Take the lines of an iteration, and of those after it, out of `metrics.json`.

    Args:
        whole: what to write in their place, if anything.
    """
    lines = read_metrics(folder)
    kept = [line for line, content in lines if content and content["iteration"] < iteration]
    if len(kept) == len(lines) and not whole:
        return
    same = next((i for i, line in enumerate(kept) if line != lines[i][0]), len(kept))
    added = json.dumps(whole, sort_keys=True).encode() + b"\n" if whole else b""
    # In its place, for Detectron2's writer has it open, and no longer than it was
    with Path(folder, METRICS).open("r+b") as file:
        file.seek(sum(map(len, kept[:same])))
        file.write(b"".join(kept[same:]) + added)
        file.truncate()


def _content(line: bytes) -> dict[str, Any]:
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
