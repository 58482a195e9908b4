"""What a run was: written beside Detectron2's own outputs, so that a report can tell it."""

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
from detectron2.data import MetadataCatalog
from torch import nn

from ..model_zoo import CONFIG_ROOT

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

RECORD = "run.json"


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of trainable and of frozen values, buffers (all of FrozenBN) among these.

    BN's counters of batches are left out: Detectron2's main keeps them in what it has frozen.
    """
    counter = "num_batches_tracked"
    buffers = [buffer for name, buffer in model.named_buffers() if not name.endswith(counter)]
    tensors = [*model.parameters(), *buffers]
    trainable = sum(t.numel() for t in tensors if t.requires_grad)
    return {"trainable": trainable, "frozen": sum(t.numel() for t in tensors) - trainable}


def categories_of(name: str) -> list[dict[str, Any]]:
    """A registered data set's categories, in the order of the model's outputs; none if unknown."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes", [])
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(names))}
    return [{"id": number, "name": names[i]} for number, i in ids.items()]


def peak_memory_mib(device: str) -> float | None:
    """Peak memory in MiB: allocated by PyTorch on a GPU, or of the whole process on a CPU.

    None where the system does not report it.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux's getrusage begins at the peak of the process that started this one
    if found := re.search(r"VmHWM:\s+(\d+) kB", _status()):
        return int(found[1]) / 2**10
    if resource is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status() -> str:
    path = Path("/proc/self/status")
    return path.read_text() if path.exists() else ""


def device_name(device: str) -> str:
    """A GPU's own name, or the number of cores and the machine type of a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{count} CPU thread{'s' * (count > 1)} ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    modules: dict[str, Any] = {"detectron2": detectron2, "torch": torch, "torchvision": torchvision}
    found = {name: module.__version__ for name, module in modules.items()}
    return {"python": platform.python_version(), **found}


def git_commit() -> str | None:
    """Commit of the checkout that this runs from, `-dirty` if changed, None if installed.

    What is installed below somebody's repository is no part of that, so git is asked of a checkout
    that has `gn_det/` at its top alone, and runs none of the programs that its settings name.
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
    """What git says of the repository at `root`, whatever the environment tells it."""
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
