"""Several trainings, one after the other or side by side, gone on with where they were stopped."""

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
from ..files import locked
from .launcher import Launcher, refuse_other_config

TRAIN = ("-m", "gn_det.engine.train")
PRETRAIN = ("-m", "gn_det.engine.pretrain")


@dataclass(frozen=True)
class Training:
    """One training, in a process of its own.

    Args:
        name: for people.
        folder: its `OUTPUT_DIR`, which `opts` sets.
        config_file: a path.
        opts: `KEY VALUE` pairs.
        program: arguments of Python that run it: a module, or a script.
        product: a file in `folder` that is there once it is finished.
        allow_remote_base: whether the config's bases may lie on the network.
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
        return read_config(self.config_file, self.opts, self.allow_remote_base)

    @property
    def size(self) -> int:
        """Pictures that it sees; a pretraining, whose schedule follows from its folder, has 0."""
        if is_pretraining(self.cfg):
            return 0
        return self.cfg.SOLVER.MAX_ITER * self.cfg.SOLVER.IMS_PER_BATCH


class Progress:
    """Says where the whole work is, and when it will be at its end."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self._left = {training: training.size for training in trainings}
        self._total = sum(self._left.values())
        self._counted: dict[Training, bool] = {}
        self._done = 0  # pictures, since the start of this command
        self._start = time.monotonic()
        self._lock = Lock()

    def say(self, what: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        print(f"[{minutes:2}:{seconds:02}] {what}", flush=True)

    def skip(self, training: Training) -> None:
        """Count one that was finished before."""
        self._left[training] = 0
        self.say(f"{training.name}: finished already")

    def begin(self, training: Training) -> None:
        """Start one, which goes on from its checkpoint if there is one."""
        self._counted[training] = not (training.folder / "last_checkpoint").exists()
        self.say(training.name)

    def advance(self, training: Training, told: str) -> None:
        """Take a progress line, as "eta: 0:01:00  iter: 19  total_loss: 2.1 ..."."""
        where = ""
        if training.size and (iteration := re.search(r"iter: (\d+)", told)):
            seen = (int(iteration[1]) + 1) * training.cfg.SOLVER.IMS_PER_BATCH
            with self._lock:
                where = self._count(training, max(training.size - seen, 0))
        print(f"    {where}{training.name}: {told}", flush=True)

    def _count(self, training: Training, left: int) -> str:
        # A resumed training's first line tells what was done before
        self._done += (self._left[training] - left) * self._counted[training]
        self._left[training], self._counted[training] = left, True
        rest = sum(self._left.values())
        passed = time.monotonic() - self._start
        eta = f"{passed * rest / self._done / 60:.0f} min" if self._done else "?"
        return f"{1 - rest / self._total:4.0%}, all in {eta} | "


def run_trainings(
    trainings: Sequence[Training],
    output: Path,
    at_once: int = 1,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run those that are not finished.

    Args:
        output: the folder of all, which the user named.
        at_once: so many side by side; each has a GPU of its own where there are as many, and
            its share of the cores where there is none.
        environment: variables that are set for all.

    Returns:
        for each that failed its name and why. The others are not lost.

    Raises:
        InputError: if one was begun with another config, or if another command runs some in
            `output`.
    """
    for training in trainings:
        refuse_other_config(training.folder, training.cfg, output)
    progress, launcher = Progress(trainings), Launcher()
    places: queue.Queue[dict[str, str]] = queue.Queue()
    for number in range(at_once):
        places.put(place(number, at_once))

    def train(training: Training) -> None:
        if (training.folder / training.product).exists():
            return progress.skip(training)
        mine = places.get()
        try:
            progress.begin(training)
            flags = ["--resume", *["--allow-remote-base"] * training.allow_remote_base]
            words = ["--config-file", training.config_file, *flags, *training.opts]
            show = partial(progress.advance, training)
            variables = {**(environment or {}), **mine}
            launcher.launch([*training.program, *words], training.folder, show, variables)
        finally:
            places.put(mine)

    with locked(output), ThreadPoolExecutor(at_once) as pool, exit_on_sigterm():
        jobs = {pool.submit(train, training): training.name for training in trainings}
        try:
            return collect_failures(jobs, progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            launcher.stop()
            raise


def collect_failures(jobs: Mapping[Future, str], progress: Progress) -> dict[str, str]:
    """Wait for all jobs, and return why some of them failed."""
    failed = {}
    for job in as_completed(jobs):
        try:
            job.result()
        except InputError as error:
            failed[jobs[job]] = str(error)
            progress.say(f"{jobs[job]} FAILED, the others go on: {error}")
    return failed


def place(number: int, at_once: int) -> dict[str, str]:
    """Environment variables that give one of several trainings its part of the machine."""
    if at_once == 1:
        return {}
    if not torch.cuda.is_available():
        return {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // at_once, 1))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
