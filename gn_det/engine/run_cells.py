"""The trainings of a comparison, run one after the other or each on a GPU of its own."""

import queue
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from detectron2.config import CfgNode

from ..data.prepare import Prepared
from ..errors import InputError
from .cells import Cell
from .run_record import RECORD
from .steps import Launcher, refuse_other_config


@dataclass
class Comparison:
    """All that is decided before the first training.

    Args:
        base: the config file that all cells share.
        opts: of each cell, the `KEY VALUE` pairs that its training is started with.
        configs: of each cell, what comes out of both.
        proposals: what was made to fit, in words.
    """

    output: Path
    base: str
    data: Prepared
    opts: dict[Cell, list[str]] = field(default_factory=dict)
    configs: dict[Cell, CfgNode] = field(default_factory=dict)
    proposals: list[str] = field(default_factory=list)

    def folder(self, cell: Cell) -> Path:
        return self.output / "runs" / cell.folder


class Progress:
    """Says where the whole comparison is, and when it will be at its end."""

    def __init__(self, configs: Mapping[Cell, CfgNode]) -> None:
        self._left = {
            cell: cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH for cell, cfg in configs.items()
        }
        self._sizes = dict(self._left)
        self._counted: dict[Cell, bool] = {}
        self._done = 0.0  # pictures, since the start of this command
        self._start = time.monotonic()
        self._lock = Lock()

    def say(self, what: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        print(f"[{minutes:2}:{seconds:02}] {what}", flush=True)

    def skip(self, cell: Cell) -> None:
        """Count a cell that was finished before."""
        self._left[cell] = 0

    def begin(self, cell: Cell, resumed: bool) -> None:
        """Start a training, which goes on from a checkpoint if `resumed`."""
        self.say(str(cell))
        self._counted[cell] = not resumed

    def advance(self, cell: Cell, cfg: CfgNode, progress: str) -> None:
        """Take a progress line of a training."""
        iteration = re.search(r"iter: (\d+)", progress)
        with self._lock:
            left = self._left[cell]
            if iteration:
                seen = (int(iteration[1]) + 1) * cfg.SOLVER.IMS_PER_BATCH
                self._left[cell] = max(self._sizes[cell] - seen, 0)
            # A resumed training's first line tells what was done before
            self._done += (left - self._left[cell]) * self._counted[cell]
            self._counted[cell] = True
            rest = sum(self._left.values())
            passed = time.monotonic() - self._start
            eta = f"{passed * rest / self._done / 60:.0f} min" if self._done else "?"
            share = 1 - rest / sum(self._sizes.values())
        print(f"    {share:4.0%}, all in {eta} | {cell}: {progress}", flush=True)


def run_cells(found: Comparison, num_gpus: int) -> dict[Cell, str]:
    """Train every cell that is not finished.

    Args:
        num_gpus: so many cells at once, each on a GPU of its own; 0 for one after the other.

    Returns:
        why cells failed; the others are not lost.
    """
    progress, launcher, failed = Progress(found.configs), Launcher(), {}
    gpus: queue.Queue[int] = queue.Queue()
    for gpu in range(max(num_gpus, 1)):
        gpus.put(gpu)

    def train(cell: Cell) -> None:
        folder, cfg = found.folder(cell), found.configs[cell]
        refuse_other_config(folder, cfg, found.output)
        if (folder / RECORD).exists():
            progress.skip(cell)
            return progress.say(f"{cell}: finished already")
        gpu = gpus.get()
        try:
            progress.begin(cell, resumed=(folder / "last_checkpoint").exists())
            environment = {"CUDA_VISIBLE_DEVICES": str(gpu)} if num_gpus > 1 else {}
            words = ["--config-file", found.base, "--resume", *found.opts[cell]]
            launcher.launch(
                "train", words, folder, lambda told: progress.advance(cell, cfg, told), environment
            )
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(max(num_gpus, 1)) as pool:
        jobs = {pool.submit(train, cell): cell for cell in found.opts}
        try:
            for job in as_completed(jobs):
                try:
                    job.result()
                except InputError as error:
                    failed[jobs[job]] = str(error)
                    progress.say(f"{jobs[job]} FAILED, the others go on: {error}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            launcher.stop()
            raise
    return failed
