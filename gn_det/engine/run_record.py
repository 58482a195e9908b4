"""What a run was: written beside Detectron2's own outputs, so that a report can tell it."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn


class RunRecorder(HookBase):
    """Writes `run.json` into the output folder, and `peak_memory_mib` into the metrics.

    `run.json` holds the norms, seed, device, parameter counts, versions and git commit.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg

    def before_train(self) -> None:
        record = {
            "seed": self._cfg.SEED,
            "device": device_name(self._cfg.MODEL.DEVICE),
            "parameters": count_parameters(self.trainer.model),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        path = Path(self._cfg.OUTPUT_DIR) / "run.json"
        path.write_text(json.dumps(record, indent=2) + "\n")

    def after_step(self) -> None:
        memory = peak_memory_mib()
        self.trainer.storage.put_scalar("peak_memory_mib", memory, smoothing_hint=False)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of trainable and of frozen values, buffers (all of FrozenBN) among these."""
    tensors = [*model.parameters(), *model.buffers()]
    trainable = sum(t.numel() for t in tensors if t.requires_grad)
    return {"trainable": trainable, "frozen": sum(t.numel() for t in tensors) - trainable}


def peak_memory_mib() -> float:
    """Peak memory in MiB: what PyTorch allocated on the GPU, or all of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def device_name(device: str) -> str:
    """A GPU's own name, or the number of cores and the machine type of a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    modules: dict[str, Any] = {"detectron2": detectron2, "torch": torch, "torchvision": torchvision}
    found = {name: module.__version__ for name, module in modules.items()}
    return {"python": platform.python_version(), **found}


def git_commit() -> str | None:
    """Commit of the checkout that this runs from, `-dirty` if changed, None if installed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
