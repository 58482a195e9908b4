"""A small `shapes` dataset and small configs; no test needs a network or a GPU."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

# Triton reads this variable on import
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Root folder of datasets, for gn_det and for the commands that tests start
DATASETS = Path(tempfile.mkdtemp(prefix="gn_det_datasets_"))
os.environ["DETECTRON2_DATASETS"] = str(DATASETS)
atexit.register(shutil.rmtree, DATASETS, ignore_errors=True)

from detectron2.engine import HookBase  # noqa: E402

from gn_det.config_file import read_config  # noqa: E402
from gn_det.data import make_shapes  # noqa: E402

ROOT = Path(__file__).parents[1]

# Covers every code path within seconds
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "2"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MASK_FORMAT", "bitmask"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "DATALOADER.NUM_WORKERS", "0"),
]

# Training from scratch must not freeze any layer
SCRATCH = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"]


def shapes_config(name: str, *opts: object):
    """A shipped config of `configs/Shapes` with the overrides in TINY and in `opts`."""
    words = [*TINY, *map(str, opts)]
    return read_config(f"Shapes/{name}.yaml", words)


def command(*words: object, **kwargs) -> subprocess.CompletedProcess:
    """Run `python WORDS...` in the root of the checkout, and capture its output."""
    arguments = [sys.executable, *map(str, words)]
    kwargs = {"cwd": ROOT, "text": True, "capture_output": True, **kwargs}
    return subprocess.run(arguments, **kwargs)


class StopAt(HookBase):
    """Interrupts a training before an iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise SystemExit


def enable_sigint() -> None:
    """For `preexec_fn`: background jobs of a shell ignore Ctrl-C, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow test_readme.py first, so that a second process can run all other tests."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session", autouse=True)
def shapes() -> Path:
    make_shapes(DATASETS / "shapes", num_train=12, num_val=6, seed=3)
    return DATASETS / "shapes"


@pytest.fixture(scope="module", autouse=True)
def remove_files(request, tmp_path_factory) -> Iterator[None]:
    """Delete the temporary files of a test module after it: checkpoints take gigabytes."""
    yield
    if not request.session.testsfailed:
        for folder in tmp_path_factory.getbasetemp().iterdir():
            shutil.rmtree(folder, ignore_errors=True)


# Two objects in each of ten images of 128 x 96 pixels
OBJECTS = [([70, 50, 40, 30], 1), ([5, 6, 20, 25], 2)]


def square(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def content(tmp_path) -> dict:
    """A COCO instances file's content; its images are in `tmp_path / "images"`."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number in range(1, 11):
        name = f"{number}.png"
        Image.new("RGB", (128, 96), (number, 0, 0)).save(tmp_path / "images" / name)
        images.append({"id": number, "file_name": name, "width": 128, "height": 96})
        for box, category in OBJECTS:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            entry |= {"bbox": box, "segmentation": square(box), "area": box[2] * box[3]}
            annotations.append({**entry, "iscrowd": 0})
    categories = [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}]
    return {"images": images, "annotations": annotations, "categories": categories}
