"""Execute training runs in sequence or in parallel, and resume interrupted ones."""

import os
import queue
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Lock

import torch
from detectron2.config import CfgNode

from ..config import is_pretraining
from ..config_file import read_config
from ..engine.run_record import RECORD
from ..errors import InputError, exit_on_sigterm
from .launcher import Launcher, check_same_config

TRAIN = ("-m", "gn_det.engine.train")
PRETRAIN = ("-m", "gn_det.engine.pretrain")


@dataclass(frozen=True)
class Training:
    """One training run, executed as a subprocess.

    Args:
        name: shown to the user.
        folder: its `OUTPUT_DIR`, which `opts` sets.
        config_file: path of the config.
        opts: `KEY VALUE` pairs.
        program: Python arguments that run it: a module, or a script.
        product: file in `folder` that exists once the run is finished.
        allow_remote_base: whether the config's `_BASE_` files may be downloaded.
    """

    name: str
    folder: Path
    config_file: str
    opts: tuple[str, ...]
    program: tuple[str, ...] = TRAIN
    product: str = RECORD
    allow_remote_base: bool = False

    @cached_property
    def cfg(self) -> CfgNode:
        """The complete config of the run."""
        return read_config(self.config_file, self.opts, self.allow_remote_base)

    @property
    def finished(self) -> bool:
        """Whether the run has ended without an error."""
        return (self.folder / self.product).exists()

    @property
    def size(self) -> int:
        """Images that it processes; 0 for pretraining, whose length depends on its data folder."""
        if is_pretraining(self.cfg):
            return 0
        return self.cfg.SOLVER.MAX_ITER * self.cfg.SOLVER.IMS_PER_BATCH


class Progress:
    """Prints the progress of all runs together, with the estimated time left.

    Args:
        trainings: all runs.
        at_once: number of runs in parallel.
    """

    def __init__(self, trainings: Sequence[Training], at_once: int = 1) -> None:
        self._at_once = at_once
        self._left = {training: training.size for training in trainings}
        self._total = sum(self._left.values())
        # Time of the last progress line of each run that is under way
        self._last: dict[Training, float] = {}
        # Images between progress lines, and the seconds that they took, summed over all runs
        self._done, self._seconds = 0, 0.0
        self._start = time.monotonic()
        self._lock = Lock()

    def log(self, message: str) -> None:
        """Print a message with the elapsed time, as "[ 1:05] message"."""
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        print(f"[{minutes:2}:{seconds:02}] {message}", flush=True)

    def skip(self, training: Training) -> None:
        """Count a run that an earlier command has finished."""
        self._left[training] = 0
        self.log(f"{training.name}: already finished")

    def begin(self, training: Training) -> None:
        """Print the name of a run that starts or resumes."""
        self.log(training.name)

    def advance(self, training: Training, line: str) -> None:
        """Print a progress line of a run, as "eta: 0:01:00  iter: 19  total_loss: 2.1 ..."."""
        overall = ""
        if training.size and (iteration := re.search(r"iter: (\d+)", line)):
            seen = (int(iteration[1]) + 1) * training.cfg.SOLVER.IMS_PER_BATCH
            with self._lock:
                overall = self._count(training, max(training.size - seen, 0))
        print(f"    {overall}{training.name}: {line}", flush=True)

    def _count(self, training: Training, left: int) -> str:
        now = time.monotonic()
        # A run's first line includes its start, and iterations of an earlier command
        if training in self._last:
            self._done += self._left[training] - left
            self._seconds += now - self._last[training]
        self._left[training], self._last[training] = left, now
        rest = sum(self._left.values())
        eta = "?"
        if self._done:
            minutes = self._seconds * rest / self._done / self._at_once / 60
            eta = f"{minutes:.0f} min"
        return f"{1 - rest / self._total:4.0%} of all runs, {eta} left | "


def run_trainings(
    trainings: Sequence[Training],
    output: Path,
    at_once: int = 1,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Execute all training runs that are not finished yet.

    Args:
        trainings: in the order in which they start.
        output: the folder of all runs, which the caller has locked.
        at_once: runs in parallel. Each has its own GPU if there are enough; on a CPU the cores
            are divided among them.
        environment: variables that are set for all.

    Returns:
        {name of a failed run: error message}. The other runs are completed.

    Raises:
        InputError: if a run was started with another config.
    """
    for training in trainings:
        check_same_config(training.folder, training.cfg, output)
    progress, launcher = Progress(trainings, at_once), Launcher()
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for number in range(at_once):
        slots.put(slot_environment(number, at_once))

    def train(training: Training) -> None:
        if training.finished:
            remove_periodic_checkpoints(training.folder)
            return progress.skip(training)
        slot = slots.get()
        try:
            progress.begin(training)
            flags = ["--resume", *["--allow-remote-base"] * training.allow_remote_base]
            arguments = ["--config-file", training.config_file, *flags, *training.opts]
            show = partial(progress.advance, training)
            variables = {**(environment or {}), **slot}
            launcher.launch([*training.program, *arguments], training.folder, show, variables)
            remove_periodic_checkpoints(training.folder)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(at_once) as pool, exit_on_sigterm():
        jobs = {pool.submit(train, training): training.name for training in trainings}
        try:
            return collect_failures(jobs, progress)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                progress.log("stopped: start the same command again to resume")
            pool.shutdown(wait=False, cancel_futures=True)
            launcher.stop()
            raise


def remove_periodic_checkpoints(folder: Path) -> None:
    """Remove the checkpoints that a finished run no longer needs to resume."""
    for path in folder.glob("model_[0-9]*.pth"):
        path.unlink()


def collect_failures(jobs: Mapping[Future, str], progress: Progress) -> dict[str, str]:
    """Wait for all jobs, and return the error messages of the failed ones by name."""
    failed = {}
    for job in as_completed(jobs):
        try:
            job.result()
        except InputError as error:
            failed[jobs[job]] = str(error)
            progress.log(f"{jobs[job]} FAILED, the other runs continue: {error}")
    return failed


def slot_environment(number: int, at_once: int) -> dict[str, str]:
    """Environment variables that give one of `at_once` parallel runs its GPU or CPU cores."""
    if at_once == 1:
        return {}
    if not torch.cuda.is_available():
        return {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // at_once, 1))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
