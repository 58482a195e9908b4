"""The installer, without a network: it keeps an installed Detectron2, and checks the hash."""

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import detectron2
import pytest
from conftest import ROOT, command

SCRIPT = ROOT / "tools" / "install_detectron2.py"


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_all(installer, root: Path) -> None:
    """Write files that contain the text of every fix exactly once."""
    for name, old, _ in installer.FIXES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{old.rstrip()}\n")


def test_does_nothing_if_detectron2_is_installed():
    done = command(SCRIPT)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Detectron2 {detectron2.__version__} is installed")
    assert done.stdout.count("\n") == 1


def test_all_fixes_are_applied(installer, tmp_path):
    write_all(installer, tmp_path)
    installer.apply_fixes(tmp_path)
    setup = (tmp_path / "setup.py").read_text()
    assert "torch" not in setup and "ext_modules" not in setup


@pytest.mark.parametrize("times", [0, 2])
def test_error_names_the_file_that_differs(installer, tmp_path, times):
    write_all(installer, tmp_path)
    path = tmp_path / "detectron2/data/transforms/transform.py"
    path.write_text("interp=Image.LINEAR\n" * times)
    with pytest.raises(SystemExit, match=rf"data/transforms/transform.py.* {times} times"):
        installer.apply_fixes(tmp_path)


def test_missing_operators_fail_only_when_used(installer):
    space: dict = {}
    failing = installer.WITHOUT_EXTENSION.replace("from detectron2 import _C", "raise ImportError")
    exec(failing, space)
    with pytest.raises(ImportError, match="nms_rotated"):
        space["_C"].nms_rotated(1)


def test_wrong_hash_is_refused(tmp_path):
    """pip refuses a tampered sdist before it runs its setup.py."""
    sdist = tmp_path / "index" / "pb1-detectron2-0.6.tar.gz"
    sdist.parent.mkdir()
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    with tarfile.open(sdist, "w:gz") as archive:
        member = tarfile.TarInfo("pb1-detectron2-0.6/setup.py")
        member.size = len(trap)
        archive.addfile(member, io.BytesIO(trap))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['detectron2'] = None\n")
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(sdist.parent), "PYTHONPATH": str(tmp_path)}
    done = command(SCRIPT, env={**os.environ, **index})
    assert done.returncode != 0
    assert "hash" in (done.stdout + done.stderr).lower()
    assert not (tmp_path / "ran").exists()


def test_missing_torch(tmp_path):
    venv.create(tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / Path(sys.executable).name
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, SCRIPT], text=True, capture_output=True, env=environment)
    assert done.returncode == 1 and "pip install torch torchvision setuptools" in done.stderr
