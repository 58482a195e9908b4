"""The facts that a run records."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

CHILD = "from gn_det.engine.run_record import peak_memory_mib; print(peak_memory_mib('cpu'))"


def test_peak_memory_excludes_the_parent_process():
    """A run that is started by a large process must not record the memory of that process."""
    size = 2**30
    np.ones(size, dtype=np.uint8)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 100 < float(done.stdout) < largest / 2


def git(folder: Path, *words: object) -> str:
    """Run git without the user's settings."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment = {**own, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=")
    command = ["git", "-C", folder, *settings, *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository whose settings name programs; they create the file `ran` when run."""
    folder = tmp_path / "repository"
    git(tmp_path, "init", "-q", folder)
    (folder / "file").write_text("1\n")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "One")
    for name in ("fsmonitor", "post-index-change"):
        program = tmp_path / "programs" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        program.chmod(0o755)
    git(folder, "config", "core.fsmonitor", tmp_path / "programs" / "fsmonitor")
    git(folder, "config", "core.hooksPath", program.parent)
    return folder


def commit_of(folder: Path, installed: bool = False, **environment: str) -> str:
    """The git commit that a copy of gn_det in a folder reports."""
    shutil.copytree(ROOT / "gn_det", folder / "gn_det", dirs_exist_ok=True)
    shutil.copytree(ROOT / "configs", folder / ("gn_det/configs" if installed else "configs"))
    code = (
        f"from gn_det.engine import run_record as r; print(r.git_commit())\n"
        f"assert r.__file__.startswith('{folder}/')"
    )
    variables = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("place", [".", "venv/lib/site-packages"])
def test_an_installed_package_has_no_commit(place, repository, tmp_path):
    """It does not belong to the surrounding repository, whose programs must not be run."""
    assert commit_of(repository / place, installed=True) == "None"
    assert not (tmp_path / "ran").exists()
    subprocess.run(["git", "-C", repository, "describe", "--always", "--dirty"], check=True)
    assert (tmp_path / "ran").exists(), "git runs the programs"


def test_a_copy_in_a_repository_has_no_commit(repository, tmp_path):
    assert commit_of(repository / "copy") == "None"
    (repository / "broken/.git").mkdir(parents=True)
    assert commit_of(repository / "broken") == "None"
    (repository / "elsewhere").mkdir()
    git(repository / "elsewhere", "init", "-q")
    git(repository / "elsewhere", "config", "core.worktree", "../..")
    assert commit_of(repository / "elsewhere") == "None"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("worktree", [False, True])
def test_a_checkout_has_its_commit(worktree, repository, tmp_path):
    """Environment variables are ignored, and programs in its settings are not run."""
    commit = git(repository, "rev-parse", "HEAD")
    folder = repository
    if worktree:
        folder = tmp_path / "worktree"
        git(repository, "worktree", "add", "-q", "--detach", folder)
        (tmp_path / "ran").unlink(missing_ok=True)
        assert (folder / ".git").is_file()
    other = tmp_path / "other"
    git(tmp_path, "init", "-q", other)
    assert commit_of(folder, GIT_DIR=str(other / ".git"), GIT_WORK_TREE=str(other)) == commit
    (folder / "file").write_text("2\n")
    shutil.rmtree(folder / "configs")
    assert commit_of(folder) == f"{commit}-dirty"
    assert not (tmp_path / "ran").exists()
