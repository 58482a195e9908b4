#!/usr/bin/env python3
"""Ways from a BN backbone to a GN one, compared: by a linear probe and by fine-tuned detectors.

Every backbone is made from one BN file: gamma and beta copied, reset, calibrated, or calibrated and
distilled. A run is one backbone, data set and seed. Finished runs are kept in OUTPUT/results.json,
and the command goes on from there.
"""

import argparse
import json
import multiprocessing
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.env import seed_all_rng
from studies.linear_probe import mean_auc
from studies.promised_moments import promised_moments
from torch import Tensor

from gn_det.checkpoint.bn_to_gn import SIDE, normalise, to_group_norm
from gn_det.checkpoint.calibrate import measured_moments
from gn_det.checkpoint.convert import Conversion, build_resnet, convert
from gn_det.checkpoint.read import read_weights
from gn_det.checkpoint.save import facts_of, save_backbone
from gn_det.comparison.initial_weights import DISTILL_STEPS
from gn_det.config import as_opts, default_device
from gn_det.config_file import read_config
from gn_det.data.unlabelled_images import load_images
from gn_det.engine.train import Trainer
from gn_det.files import write_whole

# After 250 a seed was worth 1 AP, and the order of two norms another one than after 1000
ITERATIONS = 1000


@dataclass(frozen=True)
class Model:
    """A way to a backbone, and config keys of its fine-tuning."""

    name: str
    how: str
    division: tuple[str, int] = ("NUM_GROUPS", 32)
    pictures: int = 128
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
    Model("GN calibrated, 8 pictures", "calibrated", pictures=8),
    Model("GN calibrated, 32 pictures", "calibrated", pictures=32),
    Model("GN calibrated, foreign pictures", "calibrated", foreign=True),
    Model("GN calibrated to what gamma and beta promise", "promised"),
    Model("GN calibrated, gamma and beta at 10 times the rate", "calibrated", opts=FAST_NORM),
)


@dataclass(frozen=True)
class Run:
    """One backbone on one data set; `folder` has images/ and instances_{train,val}.json."""

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
        return f"{self.data}, {'probe' if self.probe else 'AP'}, {self.model.name}, {self.seed}"

    def pictures(self) -> list[Path]:
        """A choice of the training pictures, without their labels."""
        folder = Path(self.foreign if self.model.foreign else self.folder)
        images = json.loads((folder / "instances_train.json").read_text())["images"]
        chosen = random.Random(self.seed).sample(images, min(self.model.pictures, len(images)))
        return [folder / "images" / image["file_name"] for image in chosen]

    @property
    def converted(self) -> Path:
        """Where the backbone is kept, by all that it depends on."""
        model = self.model
        facts = (model.how, *model.division, model.pictures, model.foreign, self.data, self.seed)
        return Path(self.output) / "backbones" / f"{'_'.join(map(str, facts))}.pth"

    def convert(self) -> Conversion:
        """The backbone that the model's name promises."""
        if self.converted.exists():
            return convert(read_weights(self.converted))
        conversion = convert(read_weights(Path(self.backbone)))
        key, number = self.model.division
        keys = [f"MODEL.GROUP_NORM.{key}", str(number)]
        if self.model.how in ("calibrated", "promised", "distilled"):
            steps = DISTILL_STEPS if self.model.how == "distilled" else 0
            goal = promised_moments if self.model.how == "promised" else measured_moments
            to_group_norm(conversion, keys, self.pictures(), steps, goal)
        elif self.model.how in ("copied", "reset"):
            conversion.cfg.MODEL.RESNETS.NORM = "GN"
            tensors = {k: v for k, v in conversion.tensors.items() if "running" not in k}
            if self.model.how == "reset":
                tensors |= {k: torch.ones_like(v) for k, v in tensors.items() if "norm.w" in k}
                tensors |= {k: torch.zeros_like(v) for k, v in tensors.items() if "norm.b" in k}
            conversion.tensors = tensors
        self.converted.parent.mkdir(exist_ok=True)
        save_backbone(conversion.tensors, conversion.cfg, self.converted)
        return conversion

    def execute(self) -> dict[str, float]:
        torch.set_num_threads(1)
        seed_all_rng(self.seed)
        conversion = self.convert()
        return self.probe_features(conversion) if self.probe else self.fine_tune(conversion)

    def fine_tune(self, conversion: Conversion) -> dict[str, float]:
        """Box and mask AP of a small Mask R-CNN with GN in FPN and heads, at 2 images a batch."""
        folder = Path(self.output) / self.key.replace(", ", "_").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        names = {split: f"{self.data}_{split}_study" for split in ("train", "val")}
        for split, name in names.items():
            annotations = f"{self.folder}/instances_{split}.json"
            register_coco_instances(name, {}, annotations, f"{self.folder}/images")
        facts = facts_of(conversion.cfg)
        if self.model.how == "bn":
            facts["MODEL.RESNETS.NORM"] = "FrozenBN"
        truth = json.loads(Path(annotations).read_text())
        side = int(statistics.median(min(i["height"], i["width"]) for i in truth["images"]))
        keys = {
            **facts,
            "MODEL.WEIGHTS": str(self.converted),
            # FPN and heads are the same beside every backbone
            "MODEL.GROUP_NORM.HEADS_NUM_GROUPS": 32,
            "MODEL.DEVICE": default_device(),
            "MODEL.ROI_HEADS.NUM_CLASSES": len(truth["categories"]),
            "DATASETS.TRAIN": (names["train"],),
            "DATASETS.TEST": (names["val"],),
            "INPUT.MIN_SIZE_TRAIN": (side,),
            "INPUT.MIN_SIZE_TEST": side,
            # A picture of dsb256 has up to 99 objects
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
        opts = as_opts(keys)
        opts += [*self.model.opts, *self.opts]
        config = "Shapes/mask_rcnn_R_18_FPN_gn.yaml"
        trainer = Trainer(read_config(config, opts))
        trainer.resume_or_load(resume=False)
        trainer.train()
        latest = trainer.storage.latest()
        for file in folder.glob("*.pth"):
            file.unlink()
        return {"box AP": latest["bbox/AP"][0], "mask AP": latest["segm/AP"][0]}

    @torch.no_grad()
    def probe_features(self, conversion: Conversion) -> dict[str, float]:
        """Mean AUC of a linear probe of pooled res4 and res5, and how near these are to BN's."""
        contents: dict[str, set[int]] = {}
        for split in ("train", "val"):
            truth = json.loads(Path(self.folder, f"instances_{split}.json").read_text())
            files = {image["id"]: image["file_name"] for image in truth["images"]}
            contents |= {name: set() for name in files.values()}
            for annotation in truth["annotations"]:
                contents[files[annotation["image_id"]]].add(annotation["category_id"])
        classes = sorted(set().union(*contents.values()))
        labels = torch.tensor([[c in found for c in classes] for found in contents.values()])
        paths = [Path(self.folder, "images", name) for name in contents]
        original = convert(read_weights(Path(self.backbone)))
        features, reference = (pooled_features(c, paths) for c in (conversion, original))
        correlation = torch.corrcoef(torch.stack([features.flatten(), reference.flatten()]))[0, 1]
        return {"AUC": mean_auc(features, labels, self.seed), "correlation": correlation.item()}


def pooled_features(conversion: Conversion, paths: list[Path]) -> Tensor:
    """res4 and res5 averaged over each picture, (N, channels)."""
    resnet = build_resnet(conversion.cfg, conversion.tensors)
    pictures = load_images(paths, SIDE, conversion.cfg.INPUT.FORMAT)
    parts = [resnet(part) for part in normalise(pictures, conversion.cfg).split(16)]
    pooled = [[part[stage].mean((2, 3)) for stage in ("res4", "res5")] for part in parts]
    return torch.cat([torch.cat(stages, dim=1) for stages in pooled])


def all_runs(args: argparse.Namespace) -> list[Run]:
    """Every run, the most telling first."""
    first = args.data[0]
    probed = [("probe", args.probe, first[1], True)] if args.probe else []
    tuned = [(name, folder, args.probe or folder, False) for name, folder in args.data]
    runs = []
    for models, sets in ((CORE, [*probed, *tuned]), (MORE, [*probed, tuned[0]])):
        for seed in args.seeds:
            for name, folder, foreign, probe in sets:
                for model in [m for m in models if m.name in (args.models or [m.name])]:
                    # A probe trains nothing, and foreign pictures need a second folder
                    if (probe and model.opts) or (model.foreign and folder == foreign):
                        continue
                    where = (args.backbone, str(args.output_dir), tuple(args.opts))
                    runs.append(Run(model, name, folder, foreign, seed, probe, *where))
    return runs


def execute(run: Run) -> tuple[str, dict[str, float]]:
    """In a process of its own."""
    return run.key, run.execute()


def tabulate(runs: list[Run], results: dict[str, dict[str, float]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    columns = list(dict.fromkeys((r.data, m) for r in runs for m in results.get(r.key, ())))
    lines = ["| model | " + " | ".join(f"{data}, {m}" for data, m in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for model in (*CORE, *MORE):
        cells = []
        for column in columns:
            values = values_of(runs, results, model, *column)
            digits = 1 if "AP" in column[1] else 3
            cells.append(spread(values, digits) if values else "")
        if any(cells):
            lines.append(f"| {model.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def values_of(
    runs: list[Run], results: dict[str, dict[str, float]], model: Model, data: str, measure: str
) -> list[float]:
    """One measure of a model on one data set, seed by seed."""
    mine = [results[r.key] for r in runs if (r.model, r.data) == (model, data) and r.key in results]
    return [result[measure] for result in mine if measure in result]


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation, and the number of seeds where it is not all of them."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    note = "" if len(values) == 3 else f" ({len(values)} seed{'s' * (len(values) > 1)})"
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}{note}"


def plot(runs: list[Run], results: dict[str, dict[str, float]], path: Path) -> None:
    """Box AP of every model, a panel for each data set, a dot for each seed."""
    sets = list(dict.fromkeys(r.data for r in runs if not r.probe))
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets) + 2, 5), squeeze=False)
    for axis, data in zip(axes[0], sets, strict=True):
        found = [(m, values_of(runs, results, m, data, "box AP")) for m in (*CORE, *MORE)]
        found = [(model, values) for model, values in found if values][::-1]
        for y, (model, values) in enumerate(found):
            colour = "tab:gray" if model.how == "bn" else "tab:blue"
            axis.barh(y, statistics.mean(values), color=colour, alpha=0.4)
            axis.plot(values, [y] * len(values), "o", color=colour, markersize=4)
        axis.set_yticks(range(len(found)), [model.name for model, _ in found])
        axis.set_title(data)
        axis.set_xlabel("box AP")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    pair = "NAME=FOLDER"
    add("backbone", help="a BN ResNet, as tools/convert_backbone.py takes it")
    help_ = "COCO-format data that detectors are fine-tuned on: images/, instances_{train,val}.json"
    add("--data", nargs="+", required=True, metavar=pair, help=help_)
    help_ = "photographs in the same format, for the probe, and as foreign pictures"
    add("--probe", metavar="FOLDER", help=help_)
    add("--output-dir", type=Path, default=Path("output/study_calibration"), metavar="FOLDER")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--models", nargs="+", choices=[m.name for m in (*CORE, *MORE)], help="all by default")
    add("--processes", type=int, default=2, help="runs side by side, one thread each")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, for fine-tuning")
    args = parser.parse_args()
    args.data = [tuple(word.split("=", 1)) for word in args.data]
    return args


def main() -> None:
    """Run what is not in OUTPUT/results.json yet, and write table and plot."""
    args = parse()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    runs = all_runs(args)
    left = [run for run in runs if run.key not in results]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, maxtasksperchild=1) as pool:
        for key, result in pool.imap_unordered(execute, left):
            print(key, result, flush=True)
            results[key] = result
            with write_whole(path) as file:
                file.write(json.dumps(results, indent=1) + "\n")
    (args.output_dir / "table.md").write_text(tabulate(runs, results))
    plot(runs, results, args.output_dir / "plot.png")
    print(tabulate(runs, results))


if __name__ == "__main__":
    main()
