"""Facts about a run, which are recorded beside Detectron2's outputs for later reports."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from ..data.coco import check_same_classes, class_names
from ..data.json_files import read_json
from ..errors import InputError
from ..model_zoo import CONFIG_ROOT
from ..modeling.parts import SETTINGS

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

RECORD = "run.json"


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count trainable and frozen parameters.

    Buffers count as frozen, since those of FrozenBN are its parameters. Settings and counters, such
    as anchors and pixel means, are not counted.

    Args:
        model: the model.

    Returns:
        numbers of elements by "trainable" and "frozen".
    """
    buffers = [b for name, b in model.named_buffers() if not re.search(SETTINGS, name)]
    tensors = [*model.parameters(), *buffers]
    trainable = sum(t.numel() for t in tensors if t.requires_grad)
    return {"trainable": trainable, "frozen": sum(t.numel() for t in tensors) - trainable}


def categories_of(name: str) -> list[dict[str, Any]]:
    """The categories of a registered dataset, as dicts with `id` and `name`.

    Args:
        name: name of the dataset.

    Returns:
        the categories in the order of the model's class indices; empty if they are unknown.
    """
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes", [])
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(names))}
    return [{"id": number, "name": names[i]} for number, i in ids.items()]


def check_trained_classes(folder: Path, cfg: CfgNode) -> None:
    """Refuse to evaluate a model on datasets with other classes than it was trained on.

    Args:
        folder: of the weights; without `run.json` in it, nothing is known and checked.
        cfg: `DATASETS.TEST` names the datasets.

    Raises:
        InputError: naming the first class that differs.
    """
    try:
        recorded = read_json(folder / RECORD)["categories"]
        trained = [str(category["name"]) for category in recorded]
    except (InputError, KeyError, TypeError):
        return
    for name in cfg.DATASETS.TEST:
        check_same_classes({f"{folder / RECORD}": trained, f"dataset {name}": class_names(name)})


def peak_memory_mib(device: str) -> float | None:
    """The peak memory since the start of this process.

    Args:
        device: the value of `MODEL.DEVICE`.

    Returns:
        MiB allocated by PyTorch on a GPU, or resident MiB of the process on a CPU; None if the
        system does not report it.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    # On Linux, the peak of getrusage is inherited from the parent process
    if match := re.search(r"VmHWM:\s+(\d+) kB", _status()):
        return int(match[1]) / 2**10
    if resource is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status() -> str:
    path = Path("/proc/self/status")
    return path.read_text() if path.exists() else ""


def device_name(device: str) -> str:
    """The name of the GPU, or the number of threads and the machine type of the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{count} CPU thread{'s' * (count > 1)} ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence the results of a run."""
    modules: dict[str, Any] = {"detectron2": detectron2, "torch": torch, "torchvision": torchvision}
    packages = {name: module.__version__ for name, module in modules.items()}
    return {"python": platform.python_version(), **packages}


def git_commit() -> str | None:
    """The git commit of the checkout that this package runs from.

    A package that is installed inside another repository does not belong to it, so `gn_det/` must
    be at the top level of the repository. Hooks and other programs that are configured in the
    repository are not run.

    Returns:
        the full hash, with the suffix `-dirty` if there are changes; None without a checkout.
    """
    package = Path(__file__).resolve().parents[1]
    root, installed = package.parent, CONFIG_ROOT.resolve().parent == package
    if installed or not (root / ".git").exists():
        return None
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *words: str) -> str:
    """Run git in the repository at `root`, ignoring git's environment variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_CEILING_DIRECTORIES": str(root.parent), "GIT_OPTIONAL_LOCKS": "0"}
    settings = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    done = subprocess.run(
        ["git", "-C", str(root), *settings, *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
