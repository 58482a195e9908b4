"""Run the engine's modules as subprocesses."""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..config_file import HEADER
from ..engine.train import PARENT
from ..errors import InputError

# Seconds that a subprocess has to finish its iteration and save a checkpoint
PATIENCE = 120.0


def check_same_config(folder: Path, cfg: CfgNode, root: Path) -> None:
    """Refuse to resume a training run that was started with another config.

    Args:
        folder: the `OUTPUT_DIR` of the run.
        cfg: the config that it would be resumed with.
        root: the output folder of the command, for the message.

    Raises:
        InputError: if the configs differ.
    """
    written = folder / "config.yaml"
    # Without metrics.json the run was stopped before its first iteration: nothing to protect
    started = written.exists() and (folder / "metrics.json").exists()
    # Older runs have no comment above
    if started and written.read_text().removeprefix(HEADER) != cfg.dump():
        raise InputError(
            f"{root} contains runs with other settings ({written} differs): "
            "remove that folder, or choose another with --output-dir"
        )


def in_own_words(error: str) -> str:
    """An error of `train_net.py`, without flags that the commands for several runs do not have."""
    for flag, words in (
        ("--resume resumes", "the same command resumes"),
        ("--skip-bad-batches N", "SOLVER.SKIP_BAD_BATCHES N"),
        ("which --resume cannot change", "which a resumed run cannot change"),
    ):
        error = error.replace(flag, words)
    return error


class Launcher:
    """Starts Python subprocesses, and can terminate all of them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()

    def launch(
        self,
        arguments: Sequence[str],
        folder: Path,
        show: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run Python and wait until it exits.

        Args:
            arguments: of the interpreter.
            folder: the `OUTPUT_DIR` of the run, for the error message.
            show: called with every progress line, as
                "eta: 0:01:00  iter: 19  total_loss: 2.1 ...".
            environment: variables added to this process's own.

        Raises:
            InputError: if it exits with an error; the message has the end of its output.
        """
        tail: deque[str] = deque(maxlen=15)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **(environment or {}), PARENT: str(os.getpid())},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        self._running.add(process)
        try:
            for line in process.stdout:
                tail.append(line)
                if progress := re.search(r"(eta: .*?)\s+(data_time|time): ", line):
                    show(progress[1])
        finally:
            if sys.exc_info()[0]:
                process.terminate()
            process.wait()
            self._running.discard(process)
        if process.returncode:
            has_reason = tail and tail[-1].startswith("error: ")
            reason = (
                in_own_words(tail[-1].strip())
                if has_reason
                else f"its last output was\n{''.join(tail)}"
            )
            raise InputError(f"{folder.name} failed, see {folder}/log.txt: {reason}")

    def stop(self) -> None:
        """Terminate all running subprocesses, and kill those that do not end in time."""
        running = list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + PATIENCE
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
