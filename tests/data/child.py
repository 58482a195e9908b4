"""Checks of hostile input run in a process of their own, so that a crash fails one test."""

import os
import resource
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_in_child(file: str, *words: object, seconds: float = 120) -> None:
    """Run a test file as a program, which may import tests/faults, and expect that it ends well."""
    folders = [str(TESTS.parent), str(TESTS / "faults"), str(TESTS / "data")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, file, *map(str, words)]
    done = subprocess.run(command, env=environment, timeout=seconds, capture_output=True, text=True)
    # A number below 0 is a signal, as after reading beyond an array
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"


def limit_memory(gib: int) -> None:
    """Of this process; what needs more fails."""
    resource.setrlimit(resource.RLIMIT_AS, (gib << 30, gib << 30))
