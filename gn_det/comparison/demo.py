"""Run the demo: compare BN* with GN on a small generated dataset, from pretraining to a report.

Every step is one of the project's commands, run as a subprocess. A step is finished once its result
is in the output folder, so the same command resumes an interrupted demo.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config import as_opts, default_device
from ..data import make_shapes
from ..engine.pretrain import CHECKPOINT
from ..engine.run_record import RECORD
from ..errors import InputError, exit_on_input_error
from ..evaluation.metrics_file import metrics_of
from ..evaluation.report import Run, write_report
from ..files import locked
from ..model_zoo import get_config_file
from .jobs import PRETRAIN, TRAIN, Training, run_trainings

TITLE = "BN* against GN: the demo"
EXAMPLE = "example: gn-det demo --output-dir output/demo"
TEXT = (
    "Two ResNet-18 backbones are pretrained by classifying object crops at batch 32, one with "
    "BatchNorm and one with Group Normalization. Three Mask R-CNNs (FPN, 4conv1fc box head) are "
    "then fine-tuned at 2 images a batch, with the same seed, data, schedule and heads. BN* is "
    "BatchNorm with its statistics frozen, the usual choice for fine-tuning detectors."
)
# (model, description of its norms, its config, the config of its pretraining)
MODELS = (
    ("BN*", "backbone: frozen BN", "mask_rcnn_R_18_FPN_frozenbn", "pretrain_R_18_bn"),
    ("GN", "backbone, FPN, box and mask head: GN", "mask_rcnn_R_18_FPN_gn", "pretrain_R_18_gn"),
    ("BN", "backbone: BN, left unfrozen", "mask_rcnn_R_18_FPN_bn", "pretrain_R_18_bn"),
)
# Enough to tell a difference of 3 AP from 0 with one seed
NUM_VAL = 300
PRETRAININGS = sorted({model[3] for model in MODELS})


class Demo:
    """The steps of the demo in one output folder.

    Args:
        output: created if it does not exist.
        opts: `KEY VALUE` overrides for every training run, as `SOLVER.MAX_ITER 100`.
    """

    def __init__(self, output: Path, opts: list[str]) -> None:
        self.output = output
        self.shapes = output / "datasets" / "shapes"
        self.device = default_device()
        self.opts = opts
        self.start = time.monotonic()

    def run(self) -> None:
        """Generate the dataset, pretrain, fine-tune, evaluate, and write the report.

        Raises:
            InputError: if the folder is not writable or has runs with other settings, or a run
                fails.
        """
        if not self.shapes.exists():
            self.log("generating the dataset `shapes`")
            make_shapes(self.shapes, num_val=NUM_VAL)
        pretrainings = [self.training(name, PRETRAIN, CHECKPOINT) for name in PRETRAININGS]
        tunings = []
        for _, _, config, pretraining in MODELS:
            weights = str(self.output / pretraining / CHECKPOINT)
            tunings.append(self.training(config, TRAIN, RECORD, weights))
        environment = {"DETECTRON2_DATASETS": str(self.shapes.parent)}
        for trainings in (pretrainings, tunings):
            for failure in run_trainings(trainings, self.output, 1, environment).values():
                raise InputError(failure)
        self.report(
            Run(name, t.cfg.SOLVER.IMS_PER_BATCH, t.cfg.SEED, t.folder, where)
            for (name, where, *_), t in zip(MODELS, tunings, strict=True)
        )

    def training(
        self, config: str, program: tuple[str, ...], product: str, weights: str = ""
    ) -> Training:
        """A training run of `configs/Shapes/CONFIG.yaml`.

        Args:
            config: name of the config and of the output folder.
            program: `TRAIN` or `PRETRAIN`.
            product: file that exists once the run is finished.
            weights: `MODEL.WEIGHTS`.
        """
        keys = {
            "MODEL.DEVICE": self.device,
            "MODEL.WEIGHTS": weights,
            "OUTPUT_DIR": str(self.output / config),
        }
        opts = (*as_opts(keys), *self.opts)
        path = get_config_file(f"Shapes/{config}.yaml")
        return Training(config, self.output / config, path, opts, program, product)

    def facts(self) -> dict[str, str | int | list[str]]:
        """Facts about the data and schedules, for the report."""
        cfg = self.training(MODELS[0][2], TRAIN, RECORD).cfg
        facts: dict[str, str | int | list[str]] = {}
        for split, name in (("train", "training pictures"), ("val", "validation pictures")):
            truth = json.loads((self.shapes / f"instances_{split}.json").read_text())
            facts[name] = len(truth["images"])
        facts["fine-tuning"] = (
            f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images"
        )
        for name in PRETRAININGS:
            top1 = metrics_of(self.output / name)[-1]["accuracy/top1"]
            facts[name] = f"{top1:.1f}% top-1 on validation crops"
        facts["configs"] = [
            f"{name}: configs/Shapes/{config}.yaml" for name, _, config, _ in MODELS
        ]
        return facts

    def report(self, runs: Iterable[Run]) -> None:
        """Write the report, and print AP of every model."""
        self.log("writing the report")
        about = {"title": TITLE, "text": TEXT, "facts": self.facts()}
        results = write_report(list(runs), self.shapes / "instances_val.json", self.output, about)
        for model in results["models"]:
            box, mask = (model[kind]["AP"]["mean"] for kind in ("bbox", "segm"))
            print(f"    {model['model']:4} box AP {box:5.1f}   mask AP {mask:5.1f}")
        self.log(f"done: open {self.output / 'report.html'}")

    def log(self, message: str) -> None:
        """Print a message with the elapsed time."""
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        print(f"[{minutes:2}:{seconds:02}] {message}", flush=True)


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command `gn-det demo`, which is also `tools/demo.py`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=EXAMPLE)
    add = parser.add_argument
    help_ = "folder for data, runs and report (default %(default)s)"
    add("--output-dir", type=Path, default=Path("output/demo"), metavar="FOLDER", help=help_)
    help_ = "KEY VALUE pairs that override the config of every training run"
    add("opts", nargs=argparse.REMAINDER, help=help_)
    args = parser.parse_args(argv)
    with exit_on_input_error(), locked(args.output_dir):
        Demo(args.output_dir, args.opts).run()
