"""Run checks of hostile input in a child process, so that a crash fails only one test."""

import os
import resource
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_in_child(file: str, *words: object, seconds: float = 120) -> None:
    """Run a test file as a script, which may import tests/faults, and assert exit code 0."""
    folders = [str(TESTS.parent), str(TESTS / "faults"), str(TESTS / "data")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, file, *map(str, words)]
    done = subprocess.run(command, env=environment, timeout=seconds, capture_output=True, text=True)
    # A negative code is a signal, such as SIGSEGV after an out-of-bounds read
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"


def limit_memory(gib: int) -> None:
    """Limit the memory of this process; larger allocations fail."""
    resource.setrlimit(resource.RLIMIT_AS, (gib << 30, gib << 30))
