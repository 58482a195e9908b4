"""A small training in a process of its own, and its variants."""

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
# Of every kind of training one; what is resumed must be exact in all of them
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
    """One training's folder, with a data set of its own."""

    folder: Path
    variant: str
    rng: random.Random
    told: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def start(self, hurt: Callable[[type[Trainer]], type[Trainer]] | None = None, *flags: str):
        """A process that trains, going on if something is there."""
        process = get_context("forkserver").Process(
            target=train, args=(self.folder, self.variant, hurt, flags)
        )
        process.start()
        return process

    def finish(self, process) -> int:
        """Its exit code, at its end; what it said is kept."""
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        said = self.folder / "said.txt"
        self.told.append(said.read_text() if said.exists() else "")
        return process.exitcode

    def run(self, hurt=None, *flags: str) -> int:
        return self.finish(self.start(hurt, *flags))

    def checkpoints(self) -> list[Path]:
        return sorted(self.output.glob("model_0*.pth"))


def train(folder: Path, variant: str, hurt: Any, flags: tuple[str, ...]) -> None:
    """A whole training in this process, as `tools/train_net.py` runs it."""
    os.setpgrp()  # as torchrun does, so that a signal can be given to all that it starts
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    # As it is by default on Linux for the processes that load
    set_start_method("fork", force=True)
    for split in ("train", "val"):
        data = folder / "data"
        path = str(data / f"instances_{split}.json")
        register_coco_instances(f"mine_{split}", {}, path, str(data / "images"))
    keys = SMALL | VARIANTS[variant] | {"OUTPUT_DIR": folder / "output"}
    words = [str(word) for pair in keys.items() for word in pair]
    config = ["--config-file", "Shapes/mask_rcnn_R_18_FPN_gn.yaml"]
    run([*config, "--resume", *flags, *words], hurt(Trainer) if hurt else Trainer)
