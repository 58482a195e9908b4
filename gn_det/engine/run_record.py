"""What a run was: written beside Detectron2's own outputs, so that a report can tell it."""

import json
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from torch import nn

from ..files import write_whole
from ..model_zoo import CONFIG_ROOT

RECORD = "run.json"


class MemoryRecorder(HookBase):
    """Writes `peak_memory_mib` into the metrics.

    Args:
        device: as in `MODEL.DEVICE`.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def after_step(self) -> None:
        memory = peak_memory_mib(self._device)
        self.trainer.storage.put_scalar("peak_memory_mib", memory, smoothing_hint=False)


class RunRecorder(HookBase):
    """Writes `run.json` once the run is at its end.

    It holds the seed, device, categories, parameter counts, versions and git commit. It is
    written after the last evaluation, so that it also says that the other outputs are whole.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._path = Path(cfg.OUTPUT_DIR) / RECORD

    def before_train(self) -> None:
        self._path.unlink(missing_ok=True)

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # stopped before its end
        record = {
            "seed": self._cfg.SEED,
            "device": device_name(self._cfg.MODEL.DEVICE),
            "categories": categories_of(self._cfg.DATASETS.TRAIN[0]),
            "parameters": count_parameters(self.trainer.model),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        with write_whole(self._path) as file:
            file.write(json.dumps(record, indent=2) + "\n")


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


def peak_memory_mib(device: str) -> float:
    """Peak memory in MiB: what PyTorch allocated on a GPU, or all of the process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux's getrusage begins at the peak of the process that started this one
    if found := re.search(r"VmHWM:\s+(\d+) kB", _status()):
        return int(found[1]) / 2**10
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
