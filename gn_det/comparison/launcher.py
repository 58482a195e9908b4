"""Steps of a longer work, each one of the engine's modules in a process of its own."""

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..errors import InputError


def refuse_other_config(folder: Path, cfg: CfgNode, whole: Path) -> None:
    """Refuse to go on from a step that was run with another config.

    Args:
        folder: the step's `OUTPUT_DIR`.
        cfg: what it would be run with now.
        whole: the folder of all steps, which the user named.

    Raises:
        InputError: if the configs differ.
    """
    written = folder / "config.yaml"
    # A step that was stopped while it wrote its config has measured nothing yet
    started = written.exists() and (folder / "metrics.json").exists()
    if started and written.read_text() != cfg.dump():
        raise InputError(
            f"{whole} was begun with other settings ({written} differs): "
            "remove that folder or name another with --output-dir"
        )


class Launcher:
    """Starts steps, and stops them all when one is to be the last."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()

    def launch(
        self,
        arguments: Sequence[str],
        folder: Path,
        show: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run Python to its end.

        Args:
            arguments: of the interpreter.
            folder: its `OUTPUT_DIR`.
            show: is given its progress lines, as "eta: 0:01:00  iter: 19  total_loss: 2.1 ...".
            environment: variables that are set for it.

        Raises:
            InputError: if it fails, with its own last words.
        """
        tail: deque[str] = deque(maxlen=15)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **(environment or {})},
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
            said_why = tail and tail[-1].startswith("error: ")
            reason = tail[-1].strip() if said_why else f"its last words were\n{''.join(tail)}"
            raise InputError(f"{folder.name} stopped, see {folder}/log.txt: {reason}")

    def stop(self) -> None:
        """End every step that runs."""
        for process in list(self._running):
            process.terminate()
