"""A small training run in a separate process, and its variants."""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import torch
from detectron2.data.datasets import register_coco_instances

from gn_det.engine.train import run
from gn_det.engine.trainer import Trainer

ITERATIONS, PERIOD, EVALUATION = 12, 3, 6
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.GROUP_NORM.NUM_GROUPS": 4,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MASK_FORMAT": "bitmask",
    "DATASETS.TRAIN": "('mine_train',)",
    "DATASETS.TEST": "('mine_val',)",
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.STEPS": "(8,)",
    "SOLVER.CHECKPOINT_PERIOD": PERIOD,
    "TEST.EVAL_PERIOD": EVALUATION,
    "SEED": 5,
}
# Different kinds of training; resuming must be exact in all of them
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"INPUT.MIN_SIZE_TRAIN": "(64,)", "DATALOADER.NUM_WORKERS": 0},
    "bfloat16, accumulated, multi-scale": {
        "INPUT.MIN_SIZE_TRAIN": "(48, 64, 80)",
        "DATALOADER.NUM_WORKERS": 2,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.AMP.DTYPE": "bfloat16",
        "SOLVER.ACCUMULATE_ITERS": 2,
        "SOLVER.KEEP_CHECKPOINTS": 2,
    },
}


@dataclass
class Training:
    """A training run, with a folder and a dataset of its own."""

    folder: Path
    variant: str
    rng: random.Random
    outputs: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def start(self, fault: Callable[[type[Trainer]], type[Trainer]] | None = None, *flags: str):
        """Start a process that trains with --resume; `fault` modifies its trainer."""
        process = get_context("forkserver").Process(
            target=train, args=(self.folder, self.variant, fault, flags)
        )
        process.start()
        return process

    def finish(self, process) -> int:
        """Wait for a process, keep its output, and return its exit code."""
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        output = self.folder / "output.txt"
        self.outputs.append(output.read_text() if output.exists() else "")
        return process.exitcode

    def run(self, fault=None, *flags: str) -> int:
        """Train in a process, and return its exit code."""
        return self.finish(self.start(fault, *flags))

    def checkpoints(self) -> list[Path]:
        """Paths of the periodic checkpoints, from old to new."""
        return sorted(self.output.glob("model_0*.pth"))


def train(folder: Path, variant: str, fault: Any, flags: tuple[str, ...]) -> None:
    """Train in this process, as `tools/train_net.py` does."""
    os.setpgrp()  # as torchrun does; signals can be sent to the process group
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    # The default for worker processes of data loaders on Linux
    set_start_method("fork", force=True)
    for split in ("train", "val"):
        data = folder / "data"
        path = str(data / f"instances_{split}.json")
        register_coco_instances(f"mine_{split}", {}, path, str(data / "images"))
    keys = SMALL | VARIANTS[variant] | {"OUTPUT_DIR": folder / "output"}
    words = [str(word) for pair in keys.items() for word in pair]
    config = ["--config-file", "Shapes/mask_rcnn_R_18_FPN_gn.yaml"]
    run([*config, "--resume", *flags, *words], fault(Trainer) if fault else Trainer)
