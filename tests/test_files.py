"""Files and folders are written whole, whatever else runs or has been killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, enable_sigint

from gn_det.files import locked, write_whole

KILLED = """
import sys, time
from pathlib import Path
from gn_det.files import write_whole
with write_whole(Path(sys.argv[1])) as file:
    file.write("half")
    file.flush()
    print("writing", flush=True)
    time.sleep(99)
"""


def killed_while_writing(path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()


def test_a_killed_process_leaves_the_old_file(tmp_path):
    """What it left beside it is removed by the next writer of that file."""
    path = tmp_path / "a.json"
    path.write_text("old")
    killed_while_writing(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with write_whole(path) as file:
        file.write("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_locked_folder_is_tidied(tmp_path):
    """Files of others, which only look unfinished, are kept."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "download.partial").write_text("mine")
    killed_while_writing(tmp_path / "deep/a.json")
    with write_whole(tmp_path / "deep/b.json") as file:
        file.write("a run of its own, in a folder below")
        with locked(tmp_path):
            left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"download.partial", ".lock", Path(file.name).name}
    assert (tmp_path / "deep/b.json").exists()


def test_two_writers_do_not_meet(tmp_path):
    """Each has a file of its own; the last one to end wins."""
    path = tmp_path / "a.json"
    words = [sys.executable, "-c", KILLED, str(path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    with write_whole(path) as file:
        file.write("whole")
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 2
    process.kill()
    process.wait()


def test_the_longest_names(tmp_path):
    path = tmp_path / ("n" * 255)
    with write_whole(path) as file:
        file.write("whole")
    assert path.read_text() == "whole"


def make_shapes(folder: Path) -> subprocess.Popen:
    words = ["tools/make_shapes.py", str(folder), "--num-train", "20", "--num-val", "1"]
    keys = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "preexec_fn": enable_sigint}
    return subprocess.Popen([sys.executable, *words], **keys)


def test_two_generators_of_one_dataset(tmp_path):
    """One of them ends with the dataset, and the other with a sentence that names it."""
    root = tmp_path / "shapes"
    one, two = make_shapes(root), make_shapes(root)
    errors = sorted([one.communicate()[1], two.communicate()[1]])
    assert sorted([one.returncode, two.returncode]) == [0, 1]
    assert "Traceback" not in errors[1] and str(root) in errors[1]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert len(list((root / "images").iterdir())) == 21


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_generator(number, tmp_path):
    process = make_shapes(tmp_path / "shapes")
    while not list(tmp_path.glob(".*/images/*.png")):
        assert process.poll() is None
    os.kill(process.pid, number)
    errors = process.communicate()[1]
    assert "Traceback" not in errors and ("SIGTERM" in errors) == (number == signal.SIGTERM)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert not list(tmp_path.iterdir())
    again = make_shapes(tmp_path / "shapes")
    again.wait()
    assert again.returncode == 0 and [p.name for p in tmp_path.iterdir()] == ["shapes"]
