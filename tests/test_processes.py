"""Processes end with the one that started them, even if that is killed."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from conftest import ROOT

from gn_det.comparison.launcher import Launcher
from gn_det.engine.distributed import TORCHRUN, count_processes, restarted_by_torchrun
from gn_det.engine.train import PARENT
from gn_det.errors import InputError

CHILD = "import time; from gn_det.processes import end_with_parent; end_with_parent()"
# A process that starts CHILD, prints its ID, and waits
PARENT_OF_A_CHILD = f"""
import subprocess, sys, time
code = {CHILD!r} + "; print(1, flush=True); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(99)
"""
# A process that loads data with one worker, which prints its ID
PARENT_OF_A_WORKER = """
import os, time
from gn_det.data.loader import TrainLoader
records = [{"width": 2, "height": 1}] * 4
options = {"batch_size": 1, "group_by_shape": False, "num_workers": 1}
loader = TrainLoader(records, lambda record: os.getpid(), lambda _: iter([0] * 99), **options)
loader.start_at(0, 0)
batches = iter(loader)
print(next(batches)[0], flush=True)
time.sleep(99)
"""


def is_running(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The same by a fork server, which is the parent of the worker and lives on
PARENT_BY_A_FORK_SERVER = """
import multiprocessing, os, time
from gn_det.processes import end_with_parent
def work(queue):
    end_with_parent()
    time.sleep(2)  # longer than an interval: it must not end while its parent lives
    queue.put(os.getpid())
    time.sleep(99)
if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    context.Process(target=work, args=(queue,)).start()
    print(queue.get(), flush=True)
    time.sleep(99)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "code",
    [PARENT_OF_A_CHILD, PARENT_OF_A_WORKER, PARENT_BY_A_FORK_SERVER],
    ids=["child", "worker", "fork server"],
)
def test_children_of_a_killed_process_end(code, tmp_path):
    (tmp_path / "parent.py").write_text(code)
    words = [sys.executable, str(tmp_path / "parent.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_launcher_names_itself_as_the_parent(tmp_path):
    code = f"import os, sys; sys.exit(int(os.environ[{PARENT!r}]) != {os.getpid()})"
    Launcher().launch(["-c", code], tmp_path, print)


def test_errors_of_a_run_name_no_flags_of_another_command(tmp_path):
    """`compare.py` has neither --resume nor --skip-bad-batches."""
    error = "error: bad. --resume resumes from x; --skip-bad-batches N skips bad batches"
    with pytest.raises(InputError, match=r"error: bad\. .*SOLVER\.SKIP_BAD_BATCHES") as caught:
        Launcher().launch(["-c", f"import sys; sys.exit({error!r})"], tmp_path, print)
    assert "--" not in str(caught.value).partition("error: ")[2]


def test_the_reader_of_the_output_has_gone():
    """As with `| head`: no traceback."""
    code = (
        "from gn_det.errors import exit_on_input_error\n"
        "with exit_on_input_error():\n"
        "    for line in range(100_000):\n"
        "        print(line)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"])
def test_odd_variables_of_torchrun(variable, monkeypatch):
    for name in (*TORCHRUN, variable):
        monkeypatch.setenv(name, "x" if name == variable else "1")
    with pytest.raises(InputError, match=variable):
        assert count_processes(Namespace(num_gpus=1, num_machines=1)) and restarted_by_torchrun()
