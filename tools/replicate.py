#!/usr/bin/env python3
"""The paper's claims on detection, measured in miniature on `shapes`, and judged by one rule.

Tables 4 to 7, Table 3's groups on detection, and AP by images per batch. Backbones are pretrained
on crops, once each, and detectors fine-tuned on every seed, all on equally many pictures. "A above
B" holds if the 95% interval of the paired difference in box AP, by bootstrap over pictures and
seeds, lies above 0, and does not hold if it lies below; else it cannot be told here. What is
finished is kept, and the same command goes on from there.
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
    from gn_det.files import write_whole
    from gn_det.model_zoo import get_config_file
    from gn_det.modeling.norm import NORM_KEYS
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

# Trainings at once, pictures that each sees
PROFILES = {"cpu": (2, 320), "gpu": (4, 1600)}
FPN, C4 = "mask_rcnn_R_18_FPN_gn", "mask_rcnn_R_50_C4_gn"
PRETRAININGS = {FPN: "pretrain_R_18_gn", C4: "pretrain_R_50_gn"}
TRUNK, *REST = NORM_KEYS.values()
BATCHES = (1, 2, 4, 8)
UNCHECKED = str(Path(__file__).with_name("studies") / "unchecked_train.py")


@dataclass(frozen=True)
class Detector:
    """A row of a table.

    Args:
        trunk: the backbone's norm.
        rest: the norms of FPN, box head and mask head; of C4 there are none.
        division: into groups, as `KEY VALUE`.
        length: of the schedule, as a multiple.
        scratch: whether it starts without a pretrained backbone.
        accident: whether it does what the checks refuse.
    """

    name: str
    trunk: str = "GN"
    rest: tuple[str, ...] = ("GN", "GN", "GN")
    config: str = FPN
    division: tuple[str, ...] = ()
    images: int = 2
    length: int = 1
    scratch: bool = False
    accident: bool = False

    @property
    def pretraining(self) -> str:
        """What its backbone is called: everything that it depends on."""
        norm = self.trunk.replace("Frozen", "")
        division = "_".join(self.division[1::2])
        return f"{PRETRAININGS[self.config]}_{norm}{f'_{division}' * bool(division)}"

    def keys(self) -> dict[str, Any]:
        """Its norms, and what follows from being pretrained or not."""
        names = REST if self.rest else ()
        frozen = 0 if self.scratch and not self.accident else 2
        freeze = {"MODEL.BACKBONE.FREEZE_AT": frozen}
        return {TRUNK: self.trunk, **dict(zip(names, self.rest, strict=True)), **freeze}


c4 = partial(Detector, config=C4, rest=())
plain = partial(Detector, rest=("", "", ""))
BN_STAR, GN, BN = plain("BN*", "FrozenBN"), Detector("GN"), plain("BN", "BN")
LN = Detector("GN, 1 group (LN)", "LN", ("LN", "LN", "LN"))
LONG = Detector("GN, long", length=2)
SCRATCH = Detector("GN from scratch, long", length=2, scratch=True)
ACCIDENT = Detector("the same, frozen at random", length=2, scratch=True, accident=True)
BOX_GN = Detector("BN*, GN in the box head", "FrozenBN", ("", "GN", ""))
BOX_BN = Detector("BN*, BN in the box head", "FrozenBN", ("", "BN", ""))
PLAIN_MASK = Detector("GN, plain mask head", rest=("GN", "GN", ""))
FEW = Detector("GN, 8 groups", division=("MODEL.GROUP_NORM.NUM_GROUPS", "8"))
WIDE = Detector("GN, 16 channels a group", division=("MODEL.GROUP_NORM.DIM_PER_GP", "16"))
C4_BN_STAR, C4_GN, C4_LN = c4("C4, BN*", "FrozenBN"), c4("C4, GN"), c4("C4, LN", "LN")
# Norm -> its detector at each batch size
BY_BATCH = {
    "BN*": {n: plain(f"BN*, {n} a batch", "FrozenBN", images=n) for n in BATCHES} | {2: BN_STAR},
    "GN": {n: Detector(f"GN, {n} a batch", images=n) for n in BATCHES} | {2: GN},
    "BN": {n: plain(f"BN, {n} a batch", "BN", images=n, accident=n == 1) for n in BATCHES}
    | {2: BN},
}
# Table, what the paper says of it on COCO, and which detector is above which
CLAIMS = (
    ("4", "C4: GN is above BN* (38.8 and 37.7)", C4_GN, C4_BN_STAR),
    ("4", "C4: GN is above LN (by 1.9)", C4_GN, C4_LN),
    ("5", "GN in the box head helps BN* (39.5 and 38.6)", BOX_GN, BN_STAR),
    ("5", "GN in the backbone helps too (40.0 and 39.5)", PLAIN_MASK, BOX_GN),
    ("5", "BN in the box head hurts (by about 9)", BN_STAR, BOX_BN),
    ("5", "BN that is not frozen is below BN* (by about 6)", BN_STAR, BN),
    ("6", "GN everywhere is above BN* (40.3 and 38.6)", GN, BN_STAR),
    ("6", "A long schedule helps GN (40.8 and 40.3)", LONG, GN),
    ("7", "Pretraining is still worth something (40.8 and 39.5)", LONG, SCRATCH),
    ("7", "A stem frozen at random costs AP (39.5 and 36.2)", SCRATCH, ACCIDENT),
    *(("3", f"{d.name}: above one group", d, LN) for d in (GN, FEW, WIDE)),
    *(
        (f"{n} a batch", f"GN is above {norm}", BY_BATCH["GN"][n], BY_BATCH[norm][n])
        for n in BATCHES
        for norm in ("BN*", "BN")
        if (norm, n) not in (("BN*", 2),)
    ),
    ("1 to 8", "BN falls with the batch", BY_BATCH["BN"][8], BY_BATCH["BN"][1]),
)
DETECTORS = list(dict.fromkeys(d for *_, above, below in CLAIMS for d in (below, above)))


class Replication:
    """All trainings below one output folder.

    Args:
        seen: pictures that each fine-tuning sees, at a length of 1.
        opts: `KEY VALUE` pairs for every training.
    """

    def __init__(self, output: Path, seen: int, seeds: list[int], opts: list[str]) -> None:
        self.output, self.seen, self.seeds = output, seen, seeds
        device = default_device()
        self.opts = ["MODEL.DEVICE", device, *opts]
        self.data = output / "datasets"

    def pretrainings(self) -> list[Training]:
        """One for each backbone."""
        trainings = {}
        for d in (d for d in DETECTORS if not d.scratch):
            keys = [TRUNK, d.trunk.replace("Frozen", ""), *d.division]
            config = PRETRAININGS[d.config]
            made = self.training(PRETRAIN, d.pretraining, config, CHECKPOINT, keys)
            trainings[d.pretraining] = made
        return list(trainings.values())

    def fine_tuning(self, detector: Detector, seed: int) -> Training:
        """One detector on one seed."""
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
        words = as_opts(keys)
        program = (UNCHECKED,) if detector.accident else TRAIN
        name = f"{detector.name}, seed {seed}"
        return self.training(program, name, detector.config, RECORD, [*words, *detector.division])

    def training(
        self, program: tuple[str, ...], name: str, config: str, product: str, keys: list[str]
    ) -> Training:
        """A training of a config of `Shapes`."""
        folder = self.output / name.replace(", ", "_").replace(" ", "-").replace("*", "star")
        opts = (*keys, *self.opts, "OUTPUT_DIR", str(folder.resolve()))
        return Training(
            name, folder, get_config_file(f"Shapes/{config}.yaml"), opts, program, product
        )

    def run(self, at_once: int) -> None:
        """Train what is not there yet.

        Raises:
            InputError: if a training fails, at the end of all others.
        """
        if not (self.data / "shapes").exists():
            self.output.mkdir(parents=True, exist_ok=True)
            make_shapes(self.data / "shapes")
        tuned = [self.fine_tuning(d, seed) for seed in self.seeds for d in DETECTORS]
        environment = {"DETECTRON2_DATASETS": str(self.data.resolve())}
        for trainings in (self.pretrainings(), tuned):
            failed = run_trainings(trainings, self.output, at_once, environment)
            if failed:
                raise InputError(f"{len(failed)} trainings failed, see above")

    def results(self) -> dict[str, Any]:
        """COCO's numbers of every run, and the verdict on every claim."""
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
            verdict = "does not hold" if gap.high < 0 else "cannot be told"
            verdict = "holds" if gap.low > 0 else verdict
            numbers = {"difference": gap.mean, "low": gap.low, "high": gap.high}
            names = {"table": table, "claim": sentence, "above": above.name, "below": below.name}
            claims.append({**names, **numbers, "verdict": verdict})
        return {
            "date": datetime.date.today().isoformat(),
            "seeds": self.seeds,
            "images_seen": self.seen,
            "opts": self.opts,
            "claims": claims,
            "runs": [
                {**summarize(run, truth), "folder": run.folder.name}
                for mine in runs.values()
                for run in mine
            ],
        }


def box_ap(results: Mapping[str, Any], detector: Detector) -> list[float]:
    """A detector's box AP, seed by seed."""
    return [run["bbox"]["AP"] for run in results["runs"] if run["norm"] == detector.name]


def markdown(results: Mapping[str, Any]) -> str:
    """The verdicts, and the AP of all detectors."""
    first = results["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        f"{results['date']}, {first['device']}, {versions}, seeds {results['seeds']}, "
        f"{results['images_seen']} pictures seen, {first['git_commit'] or 'no commit'}.",
        "",
        "| table | claim, and the paper's box AP on COCO | here | 95% interval | |",
        "|---|---|---|---|---|",
    ]
    for c in results["claims"]:
        interval = f"{c['low']:+.1f} to {c['high']:+.1f}"
        cells = (c["table"], c["claim"], f"{c['difference']:+.1f}", interval, c["verdict"])
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| detector | box AP, mean of seeds | each seed |", "|---|---|---|"]
    for detector in DETECTORS:
        values = box_ap(results, detector)
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {detector.name} | {mean(values):.1f} | {each} |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any]) -> Figure:
    """Differences with their intervals, and AP by images per batch."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {"holds": COLOURS[2], "does not hold": COLOURS[0], "cannot be told": "0.5"}
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
    """Train, judge, and write `results.json`, `results.md` and `results.png`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="gpu" if torch.cuda.is_available() else "cpu")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    add("--output-dir", type=Path, default=Path("output/replicate"), metavar="FOLDER")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for every training")
    args = parser.parse_args()
    at_once, seen = PROFILES[args.profile]
    with exit_on_input_error():
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
