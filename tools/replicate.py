#!/usr/bin/env python3
"""Test the paper's claims on detection in a small replication on the dataset `shapes`.

This covers Tables 4 to 7, the groups of Table 3, and AP by images per batch. Backbones are
pretrained on crops, once each. Detectors are fine-tuned with every seed, on equally many images.
A claim "A above B" is judged by the 95% interval of the paired difference in box AP, bootstrapped
over images and seeds. It holds if the interval is above 0, and does not hold if it is below 0.
Otherwise it is inconclusive. The same command resumes an interrupted replication.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

try:
    import torch
    from matplotlib.figure import Figure
    from studies.tables import markdown_table

    from gn_det.comparison.jobs import PRETRAIN, TRAIN, Training, run_trainings
    from gn_det.config import as_opts, default_device
    from gn_det.data import make_shapes
    from gn_det.engine.pretrain import CHECKPOINT
    from gn_det.engine.run_record import RECORD
    from gn_det.errors import InputError, exit_on_input_error
    from gn_det.evaluation.bootstrap import ImageMatches, paired_difference
    from gn_det.evaluation.coco_stats import load_coco
    from gn_det.evaluation.figures import COLOURS
    from gn_det.evaluation.report import Run, summarize
    from gn_det.files import locked, write_whole
    from gn_det.model_zoo import get_config_file
    from gn_det.modeling.norm import NORM_KEYS
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

EXAMPLE = "example: python tools/replicate.py --profile cpu --seeds 0 1 2"
# Parallel training runs, images that each processes
PROFILES = {"cpu": (2, 320), "gpu": (4, 1600)}
FPN, C4 = "mask_rcnn_R_18_FPN_gn", "mask_rcnn_R_50_C4_gn"
PRETRAININGS = {FPN: "pretrain_R_18_gn", C4: "pretrain_R_50_gn"}
BACKBONE, *HEADS = NORM_KEYS.values()
BATCHES = (1, 2, 4, 8)
UNCHECKED = str(Path(__file__).with_name("studies") / "unchecked_train.py")


@dataclass(frozen=True)
class Detector:
    """A detector of one of the tables.

    Args:
        name: in the results, and in the names of output folders.
        backbone: norm of the backbone.
        heads: norms of FPN, box head and mask head; empty for C4.
        config: name of a config in `configs/Shapes`.
        grouping: of GN, as `KEY VALUE`.
        images: per batch.
        length: factor on the length of the schedule.
        scratch: train without a pretrained backbone.
        unchecked: train although the checks refuse the recipe.
    """

    name: str
    backbone: str = "GN"
    heads: tuple[str, ...] = ("GN", "GN", "GN")
    config: str = FPN
    grouping: tuple[str, ...] = ()
    images: int = 2
    length: int = 1
    scratch: bool = False
    unchecked: bool = False

    @property
    def pretraining(self) -> str:
        """Name of the pretrained backbone, made of all settings that it depends on."""
        norm = self.backbone.replace("Frozen", "")
        grouping = "_".join(self.grouping[1::2])
        return f"{PRETRAININGS[self.config]}_{norm}{f'_{grouping}' * bool(grouping)}"

    def keys(self) -> dict[str, Any]:
        """Config keys of its norms and of the frozen stages."""
        names = HEADS if self.heads else ()
        freeze = {"MODEL.BACKBONE.FREEZE_AT": 0 if self.scratch and not self.unchecked else 2}
        return {BACKBONE: self.backbone, **dict(zip(names, self.heads, strict=True)), **freeze}


c4 = partial(Detector, config=C4, heads=())
plain = partial(Detector, heads=("", "", ""))
BN_STAR, GN, BN = plain("BN*", "FrozenBN"), Detector("GN"), plain("BN", "BN")
LN = Detector("GN, 1 group (LN)", "LN", ("LN", "LN", "LN"))
LONG = Detector("GN, long", length=2)
SCRATCH = Detector("GN from scratch, long", length=2, scratch=True)
ACCIDENT = Detector("the same, frozen at random", length=2, scratch=True, unchecked=True)
BOX_GN = Detector("BN*, GN in the box head", "FrozenBN", ("", "GN", ""))
BOX_BN = Detector("BN*, BN in the box head", "FrozenBN", ("", "BN", ""))
PLAIN_MASK = Detector("GN, plain mask head", heads=("GN", "GN", ""))
FEW = Detector("GN, 8 groups", grouping=("MODEL.GROUP_NORM.NUM_GROUPS", "8"))
WIDE = Detector("GN, 16 channels a group", grouping=("MODEL.GROUP_NORM.DIM_PER_GP", "16"))
C4_BN_STAR, C4_GN, C4_LN = c4("C4, BN*", "FrozenBN"), c4("C4, GN"), c4("C4, LN", "LN")
# Norm -> images per batch -> detector
BY_BATCH = {
    "BN*": {n: plain(f"BN*, {n} a batch", "FrozenBN", images=n) for n in BATCHES} | {2: BN_STAR},
    "GN": {n: Detector(f"GN, {n} a batch", images=n) for n in BATCHES} | {2: GN},
    "BN": {n: plain(f"BN, {n} a batch", "BN", images=n, unchecked=n == 1) for n in BATCHES}
    | {2: BN},
}
# (table, claim with its AP on COCO, detector that should be above, detector below)
CLAIMS = (
    ("4", "C4: GN is above BN* (38.8 and 37.7)", C4_GN, C4_BN_STAR),
    ("4", "C4: GN is above LN (by 1.9)", C4_GN, C4_LN),
    ("5", "GN in the box head helps BN* (39.5 and 38.6)", BOX_GN, BN_STAR),
    ("5", "GN in the backbone helps too (40.0 and 39.5)", PLAIN_MASK, BOX_GN),
    ("5", "BN in the box head hurts (by about 9)", BN_STAR, BOX_BN),
    ("5", "BN, not frozen, is below BN* (by about 6)", BN_STAR, BN),
    ("6", "GN everywhere is above BN* (40.3 and 38.6)", GN, BN_STAR),
    ("6", "A long schedule helps GN (40.8 and 40.3)", LONG, GN),
    ("7", "Pretraining helps with a long schedule, too (40.8 and 39.5)", LONG, SCRATCH),
    ("7", "A stem frozen with random weights costs AP (39.5 and 36.2)", SCRATCH, ACCIDENT),
    *(("3", f"{d.name}: above one group", d, LN) for d in (GN, FEW, WIDE)),
    *(
        (f"{n} a batch", f"GN is above {norm}", BY_BATCH["GN"][n], BY_BATCH[norm][n])
        for n in BATCHES
        for norm in ("BN*", "BN")
        if (norm, n) not in (("BN*", 2),)
    ),
    ("1 to 8", "AP of BN falls with the batch size", BY_BATCH["BN"][8], BY_BATCH["BN"][1]),
)
DETECTORS = list(dict.fromkeys(d for *_, above, below in CLAIMS for d in (below, above)))


class Replication:
    """All training runs in one output folder.

    Args:
        seen: images that each fine-tuning run processes, at a length of 1.
        seeds: of the fine-tuning runs.
        opts: `KEY VALUE` overrides for every run.
    """

    def __init__(self, output: Path, seen: int, seeds: list[int], opts: list[str]) -> None:
        self.output, self.seen, self.seeds = output, seen, seeds
        self.opts = ["MODEL.DEVICE", default_device(), *opts]
        self.data = output / "datasets"

    def pretrainings(self) -> list[Training]:
        """The pretraining run of each backbone."""
        trainings = {}
        for d in (d for d in DETECTORS if not d.scratch):
            keys = [BACKBONE, d.backbone.replace("Frozen", ""), *d.grouping]
            arguments = (PRETRAIN, d.pretraining, PRETRAININGS[d.config], CHECKPOINT, keys)
            trainings[d.pretraining] = self.training(*arguments)
        return list(trainings.values())

    def fine_tuning(self, detector: Detector, seed: int) -> Training:
        """The fine-tuning run of a detector with one seed."""
        images, end = detector.images, self.seen * detector.length // detector.images
        weights = "" if detector.scratch else self.output / detector.pretraining / CHECKPOINT
        keys = {
            **detector.keys(),
            "MODEL.WEIGHTS": weights,
            "SOLVER.IMS_PER_BATCH": images,
            "SOLVER.REFERENCE_WORLD_SIZE": 0,
            "SOLVER.BASE_LR": 0.01 * images,
            "SOLVER.MAX_ITER": end,
            "SOLVER.STEPS": (end * 2 // 3, end * 9 // 10),
            "SOLVER.WARMUP_ITERS": end // 10,
            "SOLVER.CHECKPOINT_PERIOD": end,
            "TEST.EVAL_PERIOD": 0,
            "SEED": seed,
        }
        opts = [*as_opts(keys), *detector.grouping]
        program = (UNCHECKED,) if detector.unchecked else TRAIN
        return self.training(
            program, f"{detector.name}, seed {seed}", detector.config, RECORD, opts
        )

    def training(
        self, program: tuple[str, ...], name: str, config: str, product: str, keys: list[str]
    ) -> Training:
        """A training run of `configs/Shapes/CONFIG.yaml`; its folder is named after it."""
        folder = self.output / name.replace(", ", "_").replace(" ", "-").replace("*", "star")
        opts = (*keys, *self.opts, "OUTPUT_DIR", str(folder.resolve()))
        path = get_config_file(f"Shapes/{config}.yaml")
        return Training(name, folder, path, opts, program, product)

    def run(self, at_once: int) -> None:
        """Execute all unfinished training runs, `at_once` of them in parallel.

        Raises:
            InputError: if a run failed, after all others have finished.
        """
        if not (self.data / "shapes").exists():
            make_shapes(self.data / "shapes")
        tuned = [self.fine_tuning(d, seed) for seed in self.seeds for d in DETECTORS]
        environment = {"DETECTRON2_DATASETS": str(self.data.resolve())}
        for trainings in (self.pretrainings(), tuned):
            if failed := run_trainings(trainings, self.output, at_once, environment):
                raise InputError(f"{len(failed)} training runs failed, see above")

    def results(self) -> dict[str, Any]:
        """COCO metrics of every run, and the verdict on every claim."""
        truth = load_coco(self.data / "shapes" / "instances_val.json")
        runs: dict[Detector, list[Run]] = {
            d: [
                Run(d.name, d.images, seed, self.fine_tuning(d, seed).folder) for seed in self.seeds
            ]
            for d in DETECTORS
        }
        matches = {
            d: [ImageMatches.from_results(truth, run.detections, "bbox") for run in mine]
            for d, mine in runs.items()
        }
        claims = []
        for table, sentence, above, below in CLAIMS:
            gap = paired_difference(matches[below], matches[above])
            verdict = "does not hold" if gap.high < 0 else "inconclusive"
            verdict = "holds" if gap.low > 0 else verdict
            numbers = {"difference": gap.mean, "low": gap.low, "high": gap.high}
            names = {"table": table, "claim": sentence, "above": above.name, "below": below.name}
            claims.append({**names, **numbers, "verdict": verdict})
        return {
            "date": datetime.date.today().isoformat(),
            "seeds": self.seeds,
            "pictures_seen": self.seen,
            "opts": self.opts,
            "claims": claims,
            "runs": [
                {**summarize(run, truth), "folder": run.folder.name}
                for mine in runs.values()
                for run in mine
            ],
        }


def box_ap(results: Mapping[str, Any], detector: Detector) -> list[float]:
    """Box AP of a detector for each seed."""
    return [run["bbox"]["AP"] for run in results["runs"] if run["norm"] == detector.name]


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of the verdicts, and of the AP of all detectors."""
    first = results["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    facts = (
        f"{results['date']}, {first['device']}, {versions}, seeds {results['seeds']}, "
        f"{results['pictures_seen']} images per training run, {first['git_commit'] or 'no commit'}."
    )
    columns = ("table", "claim, and the paper's box AP on COCO", "difference", "95% interval")
    claims = []
    for c in results["claims"]:
        interval = f"{c['low']:+.1f} to {c['high']:+.1f}"
        claims.append((c["table"], c["claim"], f"{c['difference']:+.1f}", interval, c["verdict"]))
    verdicts = markdown_table((*columns, "verdict"), claims)
    detectors = [(d.name, box_ap(results, d)) for d in DETECTORS]
    rows = [(n, f"{mean(ap):.1f}", ", ".join(f"{v:.1f}" for v in ap)) for n, ap in detectors]
    aps = markdown_table(("detector", "box AP, mean over seeds", "each seed"), rows)
    return f"{facts}\n\n{verdicts}\n{aps}"


def plot(results: Mapping[str, Any]) -> Figure:
    """Plot the differences with their intervals, and AP by images per batch."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {"holds": COLOURS[2], "does not hold": COLOURS[0], "inconclusive": "0.5"}
    for y, c in enumerate(reversed(results["claims"])):
        left.plot((c["low"], c["high"]), (y, y), color=colours[c["verdict"]])
        left.plot(c["difference"], y, "o", color=colours[c["verdict"]])
    labels = [f"{c['above']} above {c['below']}" for c in reversed(results["claims"])]
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("difference in box AP, 95% interval")
    for (norm, detectors), colour in zip(BY_BATCH.items(), COLOURS, strict=False):
        values = [box_ap(results, detector) for detector in detectors.values()]
        right.plot(list(detectors), [mean(v) for v in values], "-", color=colour, label=norm)
        for n, several in zip(detectors, values, strict=True):
            right.plot([n] * len(several), several, "o", color=colour, markersize=4)
    right.set_xscale("log", base=2)
    right.set_xticks(BATCHES, [str(n) for n in BATCHES])
    right.set_xlabel("images per batch")
    right.set_ylabel("box AP")
    right.legend(frameon=False)
    return figure


def main() -> None:
    """Train, evaluate the claims, and write `results.json`, `results.md` and `results.png`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=EXAMPLE)
    add = parser.add_argument
    help_ = "length of the runs, and how many run in parallel (default %(default)s)"
    default = "gpu" if torch.cuda.is_available() else "cpu"
    add("--profile", choices=PROFILES, default=default, help=help_)
    help_ = "random seeds of the fine-tuning runs (default 0 1 2)"
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help=help_)
    help_ = "folder for data, runs and results (default %(default)s)"
    add("--output-dir", type=Path, default=Path("output/replicate"), metavar="FOLDER", help=help_)
    help_ = "KEY VALUE pairs that override the config of every training run (default: none)"
    add("--opts", nargs=argparse.REMAINDER, default=[], help=help_)
    args = parser.parse_args()
    at_once, seen = PROFILES[args.profile]
    with exit_on_input_error(), locked(args.output_dir):
        replication = Replication(args.output_dir, seen, args.seeds, args.opts)
        replication.run(at_once)
        results = replication.results()
        with write_whole(args.output_dir / "results.json") as file:
            file.write(json.dumps(results, indent=1) + "\n")
        with write_whole(args.output_dir / "results.md") as file:
            file.write(markdown(results))
        plot(results).savefig(args.output_dir / "results.png", dpi=110)
        print(markdown(results))


if __name__ == "__main__":
    main()
