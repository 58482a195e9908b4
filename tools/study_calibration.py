#!/usr/bin/env python3
"""Compare conversions of a BN backbone to GN by linear probes and fine-tuned detectors.

Every backbone is converted from one BN file: gamma and beta are copied, reset, calibrated, or
calibrated and distilled. A run has one backbone, dataset and seed. Finished runs are kept in
OUTPUT/results.json, so the same command resumes an interrupted study.
"""

import argparse
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.env import seed_all_rng
from filelock import FileLock
from studies.linear_probe import image_labels, mean_auc, pooled_features
from studies.pool import run_parallel
from studies.promised_moments import to_promised_group_norm
from studies.recorded_settings import check_settings
from studies.tables import markdown_table, spread

from gn_det.checkpoint.bn_to_gn import to_group_norm
from gn_det.checkpoint.conversion import Conversion
from gn_det.checkpoint.convert import convert
from gn_det.checkpoint.read import read_weights
from gn_det.checkpoint.save import facts_of, save_backbone
from gn_det.comparison.initial_weights import DISTILL_STEPS
from gn_det.config import as_opts, default_device
from gn_det.config_file import read_config
from gn_det.engine.train import Trainer
from gn_det.errors import exit_on_input_error
from gn_det.files import locked, write_whole

EXAMPLE = "example: python tools/study_calibration.py R-50.pth --data nuclei=datasets/nuclei"
# With 250, AP varied by 1 between seeds, and two norms had another order than with 1000
ITERATIONS = 1000


@dataclass(frozen=True)
class Model:
    """A conversion of the backbone, and overrides of its fine-tuning.

    Args:
        name: in the results; it identifies finished runs.
        method: "bn", "copied", "reset", "calibrated", "promised" or "distilled".
        grouping: of GN, as (key of `MODEL.GROUP_NORM`, value).
        num_images: images that the conversion uses.
        foreign: whether the images are from the probe's dataset.
        opts: `KEY VALUE` overrides of the fine-tuning.
    """

    name: str
    method: str
    grouping: tuple[str, int] = ("NUM_GROUPS", 32)
    num_images: int = 128
    foreign: bool = False
    opts: tuple[str, ...] = ()


WIDTH_16, WIDTH_32 = ("DIM_PER_GP", 16), ("DIM_PER_GP", 32)
SLOW = ("SOLVER.BACKBONE_MULTIPLIER", "0.1")
SLOW_NORM = ("SOLVER.NORM_LR_FACTOR", "0.1")
FAST_NORM = ("SOLVER.NORM_LR_FACTOR", "10.0")
UNFROZEN = ("MODEL.BACKBONE.FREEZE_AT", "0")
SLOWLY = "backbone at a tenth of the rate"

CORE = (
    Model("BN*", "bn"),
    Model("GN, gamma and beta copied", "copied"),
    Model("GN, gamma 1 and beta 0", "reset"),
    Model("GN calibrated", "calibrated"),
    Model("GN distilled", "distilled"),
    Model("GN distilled, 16 channels per group", "distilled", WIDTH_16),
    Model(f"GN distilled, 16 channels per group, {SLOWLY}", "distilled", WIDTH_16, opts=SLOW),
    Model(f"BN*, {SLOWLY}", "bn", opts=SLOW),
)
MORE = (
    Model(f"GN distilled, {SLOWLY}", "distilled", opts=SLOW),
    Model(f"GN distilled, 32 channels per group, {SLOWLY}", "distilled", WIDTH_32, opts=SLOW),
    Model("BN*, gamma and beta of the heads at a tenth of the rate", "bn", opts=SLOW_NORM),
    Model("GN distilled, gamma and beta at a tenth of the rate", "distilled", opts=SLOW_NORM),
    Model("GN calibrated, stem and res2 trained", "calibrated", opts=UNFROZEN),
    Model("BN*, stem and res2 trained", "bn", opts=UNFROZEN),
    Model("GN calibrated, 16 groups", "calibrated", ("NUM_GROUPS", 16)),
    Model("GN calibrated, 1 group", "calibrated", ("NUM_GROUPS", 1)),
    Model("GN calibrated, 16 channels per group", "calibrated", WIDTH_16),
    Model("GN calibrated, 8 pictures", "calibrated", num_images=8),
    Model("GN calibrated, 32 pictures", "calibrated", num_images=32),
    Model("GN calibrated, foreign pictures", "calibrated", foreign=True),
    Model("GN calibrated to what gamma and beta promise", "promised"),
    Model("GN calibrated, gamma and beta at 10 times the rate", "calibrated", opts=FAST_NORM),
)


@dataclass(frozen=True)
class Run:
    """One linear probe, or one fine-tuning, of one backbone on one dataset.

    Args:
        data: name of the dataset.
        folder: of the dataset, with images/ and instances_{train,val}.json.
        foreign: folder of another dataset, whose images are foreign.
        backbone: the BN file.
    """

    model: Model
    data: str
    folder: str
    foreign: str
    seed: int
    probe: bool
    backbone: str
    output: str
    opts: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its key in results.json."""
        return f"{self.data}, {'probe' if self.probe else 'AP'}, {self.model.name}, {self.seed}"

    def images(self) -> list[Path]:
        """Paths of a random sample of training images."""
        folder = Path(self.foreign if self.model.foreign else self.folder)
        images = json.loads((folder / "instances_train.json").read_text())["images"]
        sample = random.Random(self.seed).sample(images, min(self.model.num_images, len(images)))
        return [folder / "images" / image["file_name"] for image in sample]

    @property
    def converted(self) -> Path:
        """File of the converted backbone, named by all settings that it depends on."""
        model = self.model
        facts = (
            model.method,
            *model.grouping,
            model.num_images,
            model.foreign,
            self.data,
            self.seed,
        )
        return Path(self.output) / "backbones" / f"{'_'.join(map(str, facts))}.pth"

    def convert(self) -> Conversion:
        """Convert the backbone, or read it if it was converted before."""
        self.converted.parent.mkdir(exist_ok=True)
        # Several runs may need the same backbone at the same time
        with FileLock(self.converted.with_suffix(".lock")):
            return self.read_or_convert()

    def read_or_convert(self) -> Conversion:
        """`convert`, for the process that has the backbone's lock."""
        if self.converted.exists():
            return convert(read_weights(self.converted))
        conversion = convert(read_weights(Path(self.backbone)))
        key, number = self.model.grouping
        keys = [f"MODEL.GROUP_NORM.{key}", str(number)]
        if self.model.method == "promised":
            to_promised_group_norm(conversion, keys, self.images())
        elif self.model.method in ("calibrated", "distilled"):
            steps = DISTILL_STEPS if self.model.method == "distilled" else 0
            to_group_norm(conversion, keys, self.images(), steps)
        elif self.model.method in ("copied", "reset"):
            conversion.cfg.MODEL.RESNETS.NORM = "GN"
            tensors = {k: v for k, v in conversion.tensors.items() if "running" not in k}
            if self.model.method == "reset":
                tensors |= {k: torch.ones_like(v) for k, v in tensors.items() if "norm.w" in k}
                tensors |= {k: torch.zeros_like(v) for k, v in tensors.items() if "norm.b" in k}
            conversion.tensors = tensors
        save_backbone(conversion.tensors, conversion.cfg, self.converted)
        return conversion

    def execute(self) -> dict[str, float]:
        """Run it, and return its metrics by name."""
        torch.set_num_threads(1)
        seed_all_rng(self.seed)
        conversion = self.convert()
        return self.probe_features(conversion) if self.probe else self.fine_tune(conversion)

    def fine_tune(self, conversion: Conversion) -> dict[str, float]:
        """Box and mask AP of a small Mask R-CNN with GN in FPN and heads, at 2 images per batch."""
        folder = Path(self.output) / self.key.replace(", ", "_").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        names = {split: f"{self.data}_{split}_study" for split in ("train", "val")}
        for split, name in names.items():
            annotations = f"{self.folder}/instances_{split}.json"
            register_coco_instances(name, {}, annotations, f"{self.folder}/images")
        facts = facts_of(conversion.cfg)
        if self.model.method == "bn":
            facts["MODEL.RESNETS.NORM"] = "FrozenBN"
        truth = json.loads(Path(annotations).read_text())
        side = int(statistics.median(min(i["height"], i["width"]) for i in truth["images"]))
        keys = {
            **facts,
            "MODEL.WEIGHTS": str(self.converted),
            # The same FPN and heads for every backbone
            "MODEL.GROUP_NORM.HEADS_NUM_GROUPS": 32,
            "MODEL.DEVICE": default_device(),
            "MODEL.ROI_HEADS.NUM_CLASSES": len(truth["categories"]),
            "DATASETS.TRAIN": (names["train"],),
            "DATASETS.TEST": (names["val"],),
            "INPUT.MIN_SIZE_TRAIN": (side,),
            "INPUT.MIN_SIZE_TEST": side,
            # Images of dsb256 have up to 99 objects
            "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN": 300,
            "MODEL.RPN.POST_NMS_TOPK_TEST": 300,
            "SOLVER.MAX_ITER": ITERATIONS,
            "SOLVER.STEPS": (ITERATIONS * 3 // 4, ITERATIONS * 9 // 10),
            "TEST.DETECTIONS_PER_IMAGE": 100,
            "TEST.EVAL_PERIOD": 0,
            "SOLVER.CHECKPOINT_PERIOD": ITERATIONS * 2,
            "SEED": self.seed,
            "OUTPUT_DIR": str(folder),
        }
        opts = [*as_opts(keys), *self.model.opts, *self.opts]
        trainer = Trainer(read_config("Shapes/mask_rcnn_R_18_FPN_gn.yaml", opts))
        trainer.resume_or_load(resume=False)
        trainer.train()
        latest = trainer.storage.latest()
        for file in folder.glob("*.pth"):
            file.unlink()
        return {"box AP": latest["bbox/AP"][0], "mask AP": latest["segm/AP"][0]}

    @torch.no_grad()
    def probe_features(self, conversion: Conversion) -> dict[str, float]:
        """Linear probe of pooled res4 and res5: its mean AUC, and the correlation with BN's."""
        paths, labels = image_labels(Path(self.folder))
        original = convert(read_weights(Path(self.backbone)))
        features, reference = (pooled_features(c, paths) for c in (conversion, original))
        correlation = torch.corrcoef(torch.stack([features.flatten(), reference.flatten()]))[0, 1]
        return {"AUC": mean_auc(features, labels, self.seed), "correlation": correlation.item()}


def all_runs(args: argparse.Namespace) -> list[Run]:
    """All runs of the study, the most important first."""
    first = args.data[0]
    probed = [("probe", args.probe, first[1], True)] if args.probe else []
    tuned = [(name, folder, args.probe or folder, False) for name, folder in args.data]
    runs = []
    for models, sets in ((CORE, [*probed, *tuned]), (MORE, [*probed, tuned[0]])):
        for seed in args.seeds:
            for name, folder, foreign, probe in sets:
                for model in [m for m in models if m.name in (args.models or [m.name])]:
                    # A probe has no fine-tuning to override; foreign images need a second dataset
                    if (probe and model.opts) or (model.foreign and folder == foreign):
                        continue
                    where = (args.backbone, str(args.output_dir), tuple(args.opts))
                    runs.append(Run(model, name, folder, foreign, seed, probe, *where))
    return runs


def execute(run: Run) -> tuple[str, dict[str, float]]:
    """Execute a run in a subprocess; returns its key and metrics."""
    return run.key, run.execute()


def markdown(runs: list[Run], results: dict[str, dict[str, float]]) -> str:
    """Table of means and standard deviations over seeds."""
    columns = list(dict.fromkeys((r.data, m) for r in runs for m in results.get(r.key, ())))
    rows = []
    for model in (*CORE, *MORE):
        cells = []
        for column in columns:
            values = values_of(runs, results, model, *column)
            digits = 1 if "AP" in column[1] else 3
            cells.append(spread(values, digits) if values else "")
        if any(cells):
            rows.append([model.name, *cells])
    return markdown_table(["model", *(f"{data}, {metric}" for data, metric in columns)], rows)


def values_of(
    runs: list[Run], results: dict[str, dict[str, float]], model: Model, data: str, metric: str
) -> list[float]:
    """One metric of a model on one dataset, for each seed."""
    mine = [results[r.key] for r in runs if (r.model, r.data) == (model, data) and r.key in results]
    return [result[metric] for result in mine if metric in result]


def plot(runs: list[Run], results: dict[str, dict[str, float]], path: Path) -> None:
    """Plot box AP of every model: one panel per dataset, one dot per seed."""
    sets = list(dict.fromkeys(r.data for r in runs if not r.probe))
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets) + 2, 5), squeeze=False)
    for axis, data in zip(axes[0], sets, strict=True):
        pairs = [(m, values_of(runs, results, m, data, "box AP")) for m in (*CORE, *MORE)]
        rows = [(model, values) for model, values in pairs if values][::-1]
        for y, (model, values) in enumerate(rows):
            colour = "tab:gray" if model.method == "bn" else "tab:blue"
            axis.barh(y, statistics.mean(values), color=colour, alpha=0.4)
            axis.plot(values, [y] * len(values), "o", color=colour, markersize=4)
        axis.set_yticks(range(len(rows)), [model.name for model, _ in rows])
        axis.set_title(data)
        axis.set_xlabel("box AP")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=EXAMPLE)
    add = parser.add_argument
    add("backbone", help="a BN ResNet checkpoint, in any format of tools/convert_backbone.py")
    help_ = "COCO-format datasets to fine-tune on, with images/ and instances_{train,val}.json"
    add("--data", nargs="+", required=True, metavar="NAME=FOLDER", help=help_)
    help_ = "photographs in the same format, for probes and foreign images (default: no probes)"
    add("--probe", metavar="FOLDER", help=help_)
    help_ = "folder of backbones and results (default %(default)s)"
    folder = Path("output/study_calibration")
    add("--output-dir", type=Path, default=folder, metavar="FOLDER", help=help_)
    help_ = "random seeds (default 0 1 2)"
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help=help_)
    help_, names = "conversions to run, by name (default: all)", [m.name for m in (*CORE, *MORE)]
    add("--models", nargs="+", choices=names, metavar="NAME", help=help_)
    help_ = "runs in parallel, with one thread each (default %(default)s)"
    add("--processes", type=int, default=2, metavar="N", help=help_)
    help_ = "KEY VALUE pairs that override the config of every fine-tuning (default: none)"
    add("--opts", nargs=argparse.REMAINDER, default=[], help=help_)
    args = parser.parse_args()
    args.data = [tuple(word.split("=", 1)) for word in args.data]
    return args


def main() -> None:
    """Execute all unfinished runs, and write `results.json`, `table.md` and `plot.png`."""
    args = parse()
    with exit_on_input_error(), locked(args.output_dir):
        check_settings(args)
        execute_all(args)


def execute_all(args: argparse.Namespace) -> None:
    """Execute the runs of a study that is not finished; see `main`."""
    path = args.output_dir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    runs = all_runs(args)
    left = [run for run in runs if run.key not in results]
    for key, result in run_parallel(execute, [(run,) for run in left], args.processes):
        print(key, result, flush=True)
        results[key] = result
        with write_whole(path) as file:
            file.write(json.dumps(results, indent=1) + "\n")
    with write_whole(args.output_dir / "table.md") as file:
        file.write(markdown(runs, results))
    plot(runs, results, args.output_dir / "plot.png")
    print(markdown(runs, results))


if __name__ == "__main__":
    main()
