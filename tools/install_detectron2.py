#!/usr/bin/env python3
"""Install Detectron2 0.6 from PyPI, unless a Detectron2 is already installed.

Detectron2 is not on PyPI under its own name. If you can reach GitHub, install the official main
instead:

    pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'

This script downloads one pinned sdist and checks its sha256. The sdist, `pb1-detectron2` 0.6, has
the Python files of the official tag v0.6 without the C++ sources. The script fixes the few lines
that fail with current NumPy, Pillow and setuptools, and installs a pure-Python wheel. NMS and
RoIAlign come from torchvision. Deformable convolutions and rotated boxes need the C++ sources, and
raise an ImportError when they are used.
"""

import argparse
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PROJECT, VERSION = "pb1-detectron2", "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

NO_EXTENSION = "from detectron2 import _C\n"
WITHOUT_EXTENSION = """\
try:
    from detectron2 import _C
except ImportError:

    class _C:  # built without the C++ sources: fail when an operator is used, not on import
        def __getattr__(self, name):
            raise ImportError(f"this Detectron2 was built without its C++ operator {name}")

    _C = _C()
"""

IMPORT_CAFFE2 = "from .api import *\n"
WITHOUT_CAFFE2 = """\
try:
    from .api import *
except ImportError:  # PyTorch has no caffe2 any more
    pass
"""

# (file, text that must occur exactly once, its replacement)
FIXES = [
    ("detectron2/layers/deform_conv.py", NO_EXTENSION, WITHOUT_EXTENSION),
    ("detectron2/layers/roi_align_rotated.py", NO_EXTENSION, WITHOUT_EXTENSION),
    ("detectron2/layers/rotated_boxes.py", NO_EXTENSION, WITHOUT_EXTENSION),
    (
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n"
        "    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:  # no C++ sources\n"
        "    COCOeval_opt = COCOeval\n",
    ),
    ("detectron2/export/__init__.py", IMPORT_CAFFE2, WITHOUT_CAFFE2),
    ("detectron2/data/transforms/transform.py", "interp=Image.LINEAR", "interp=Image.BILINEAR"),
    ("detectron2/data/build.py", "zeros((num_classes,), dtype=np.int)", "zeros(num_classes, int)"),
    ("detectron2/data/build.py", '"iscrowd", 0)], dtype=np.int', '"iscrowd", 0)], dtype=int'),
    ("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    (
        "detectron2/evaluation/sem_seg_evaluation.py",
        "array(output, dtype=np.int)",
        "array(output, dtype=int)",
    ),
    (
        "detectron2/evaluation/sem_seg_evaluation.py",
        "Image.open(f), dtype=np.int)",
        "Image.open(f), dtype=int)",
    ),
    (
        "detectron2/evaluation/sem_seg_evaluation.py",
        "acc = np.full(self._num_classes, np.nan, dtype=np.float)",
        "acc = np.full(self._num_classes, np.nan)",
    ),
    (
        "detectron2/evaluation/sem_seg_evaluation.py",
        "iou = np.full(self._num_classes, np.nan, dtype=np.float)",
        "iou = np.full(self._num_classes, np.nan)",
    ),
    (
        "detectron2/evaluation/sem_seg_evaluation.py",
        "diagonal()[:-1].astype(np.float)",
        "diagonal()[:-1].astype(float)",
    ),
    (
        "detectron2/evaluation/sem_seg_evaluation.py",
        "axis=0).astype(np.float)",
        "axis=0).astype(float)",
    ),
    (
        "detectron2/evaluation/sem_seg_evaluation.py",
        "axis=1).astype(np.float)",
        "axis=1).astype(float)",
    ),
    ("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", "import importlib.resources\n"),
    (
        "detectron2/model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )",
        'str(importlib.resources.files("detectron2.model_zoo").joinpath("configs", config_path))',
    ),
    ("setup.py", "import torch\n", ""),
    (
        "setup.py",
        "from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension\n",
        "",
    ),
    ("setup.py", 'torch_ver = [int(x) for x in torch.__version__.split(".")[:2]]\n', ""),
    ("setup.py", 'assert torch_ver >= [1, 8], "Requires PyTorch >= 1.8"\n', ""),
    ("setup.py", "    ext_modules=get_extensions(),\n", ""),
    ("setup.py", '    cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},\n', ""),
    ("setup.py", '"black==21.4b2"', '"black"'),
]


def pip(*args: str) -> None:
    """Run pip of this interpreter; exit with an error if it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *args])
    if done.returncode:
        sys.exit(f"install_detectron2: `pip {' '.join(args)}` failed: see its output above")


def download(folder: Path) -> Path:
    """Download the pinned sdist to `folder`, and return its path.

    pip checks the hash before it runs any code of the sdist.
    """
    pin = folder / "pin.txt"
    pin.write_text(f"{PROJECT}=={VERSION} --hash=sha256:{SHA256}\n")
    # Without build isolation, as the sdist's setup.py imports torch
    pip(
        *("download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"),
        *("--require-hashes", "--requirement", str(pin), "--dest", str(folder)),
    )
    return next(folder.glob("*.tar.gz"))


def apply_fixes(root: Path) -> None:
    """Apply `FIXES` to the sources in `root`; exit with an error if one does not match once."""
    for name, old, new in FIXES:
        text = (root / name).read_text()
        if text.count(old) != 1:
            sys.exit(
                f"install_detectron2: {name} contains {old.strip()!r} {text.count(old)} times "
                f"instead of once, so it is not {PROJECT} {VERSION}; nothing was installed"
            )
        (root / name).write_text(text.replace(old, new))


def main() -> None:
    """Install Detectron2 unless it can be imported."""
    argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/install_detectron2.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        detectron2 = importlib.import_module("detectron2")
    except ModuleNotFoundError:
        pass
    else:
        print(f"Detectron2 {detectron2.__version__} is installed: nothing to do.")
        return
    for package in ("torch", "torchvision", "setuptools"):
        if importlib.util.find_spec(package) is None:
            sys.exit("install_detectron2: run pip install torch torchvision setuptools first")
    print(__doc__.partition("\n\n")[2])
    print(f"Installing {PROJECT} {VERSION} into {sys.prefix}", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        with tarfile.open(download(folder)) as sdist:
            sdist.extractall(folder, filter="data")
        root = folder / f"{PROJECT}-{VERSION}"
        apply_fixes(root)
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder / "wheel"), str(root))
        pip("install", "--quiet", str(next((folder / "wheel").glob("*.whl"))))


if __name__ == "__main__":
    main()
