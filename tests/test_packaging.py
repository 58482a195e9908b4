"""An installed wheel contains all configs and templates, and finds them."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, command

CONFIGS = sorted(p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # Build in a copy, which leaves the checkout unchanged
    keep = ("gn_det", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in keep), str(source)], check=True)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    subprocess.run([*pip, "-w", folder, source], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_contains_every_config(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(CONFIGS) > 10
    for config in CONFIGS:
        assert f"gn_det/configs/{config}" in names
    assert "gn_det/evaluation/templates/report.html" in names and "gn_det/py.typed" in names
    (scripts,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "gn-det = gn_det.cli:main" in zipfile.ZipFile(wheel).read(scripts).decode()
    assert not [name for name in names if name.startswith(("tests", "tools"))]


def test_installed_wheel_finds_its_configs(wheel, tmp_path):
    """Unpack the wheel outside of the checkout, whose configs must not be used."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import gn_det, sys; from detectron2.config import get_cfg; cfg = get_cfg();"
        "gn_det.add_gn_config(cfg);"
        f"path = gn_det.get_config_file('{CONFIGS[-1]}'); cfg.merge_from_file(path);"
        "assert 'detectron2.model_zoo' not in sys.modules;"
        "print(gn_det.__file__, path)"
    )
    done = command("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split())
