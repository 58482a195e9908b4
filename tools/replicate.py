#!/usr/bin/env python3
"""Test the paper's claims on detection in a small replication on the dataset `shapes`.

This covers Tables 5 to 7, LN against GN, and AP by images per forward pass. For each seed,
backbones are pretrained on crops, and detectors fine-tuned from them, all on equally many images. A
claim "A is above B" is judged for box AP and for mask AP; `studies/verdicts.py` has the rule. The
same command resumes an interrupted replication.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

try:
    import torch
    from matplotlib.figure import Figure
    from studies.claims import (
        BACKBONE,
        BN,
        BN_STAR,
        CLAIMS,
        GN,
        IMAGES,
        LARGER_CLAIMS,
        PRETRAININGS,
        Claim,
        Detector,
        detectors_of,
    )
    from studies.tables import markdown_table
    from studies.verdicts import FAILS, HOLDS, Runs, judge

    from gn_det.comparison.jobs import PRETRAIN, TRAIN, Training, run_trainings
    from gn_det.config import as_opts, default_device
    from gn_det.data import make_shapes
    from gn_det.engine.pretrain import CHECKPOINT
    from gn_det.engine.run_record import RECORD
    from gn_det.errors import InputError, exit_on_input_error
    from gn_det.evaluation.bootstrap import ImageMatches
    from gn_det.evaluation.coco_stats import load_coco
    from gn_det.evaluation.figures import COLOURS
    from gn_det.evaluation.report import Run, summarize
    from gn_det.files import locked, write_whole
    from gn_det.model_zoo import get_config_file
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

EXAMPLE = "example: python tools/replicate.py --profile cpu --seeds 0 1 2"


class Profile(NamedTuple):
    """Size of a replication.

    Args:
        at_once: training runs in parallel.
        steps: of each fine-tuning run, at a length of 1.
        claims: to test.
    """

    at_once: int
    steps: int
    claims: tuple[Claim, ...]


PROFILES = {"cpu": Profile(2, 160, CLAIMS), "gpu": Profile(4, 400, LARGER_CLAIMS)}
# Enough to tell small differences, for little of the time
NUM_VAL = 300
PRETRAINING_BATCH = 8
UNCHECKED = str(Path(__file__).with_name("studies") / "unchecked_train.py")
KINDS = {"bbox": "box", "segm": "mask"}


class Replication:
    """All training runs in one output folder.

    Args:
        profile: its size.
        seeds: of the training runs, at least 2.
        opts: `KEY VALUE` overrides for every run.

    Raises:
        InputError: if there are fewer seeds, or a seed twice.
    """

    def __init__(self, output: Path, profile: Profile, seeds: list[int], opts: list[str]) -> None:
        if len(set(seeds)) < max(len(seeds), 2):
            raise InputError(f"--seeds {' '.join(map(str, seeds))}: give at least 2 different ones")
        self.output, self.profile, self.seeds = output, profile, seeds
        self.opts = ["MODEL.DEVICE", default_device(), *opts]
        self.data = output / "datasets"
        self.detectors = detectors_of(profile.claims)

    def pretrainings(self) -> list[Training]:
        """The pretraining runs, one of each backbone and seed."""
        trainings = {}
        for seed in self.seeds:
            for d in (d for d in self.detectors if not d.scratch):
                norm = d.backbone.replace("Frozen", "")
                keys = {BACKBONE: norm, "SOLVER.IMS_PER_BATCH": PRETRAINING_BATCH, "SEED": seed}
                name, opts = f"{d.pretraining}, seed {seed}", [*as_opts(keys), *d.grouping]
                arguments = (PRETRAIN, name, PRETRAININGS[d.config], CHECKPOINT, opts)
                trainings[name] = self.training(*arguments)
        return list(trainings.values())

    def fine_tuning(self, detector: Detector, seed: int) -> Training:
        """The fine-tuning run of a detector with one seed."""
        end = self.profile.steps * detector.length
        backbone = self.folder(f"{detector.pretraining}, seed {seed}") / CHECKPOINT
        keys = {
            **detector.keys(),
            "MODEL.WEIGHTS": "" if detector.scratch else backbone,
            "SOLVER.REFERENCE_WORLD_SIZE": 0,
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

    def folder(self, name: str) -> Path:
        """Output folder of a training run."""
        return self.output / name.replace(", ", "_").replace(" ", "-").replace("*", "star")

    def training(
        self, program: tuple[str, ...], name: str, config: str, product: str, keys: list[str]
    ) -> Training:
        """A training run of `configs/Shapes/CONFIG.yaml`; its folder is named after it."""
        folder = self.folder(name)
        opts = (*keys, *self.opts, "OUTPUT_DIR", str(folder.resolve()))
        path = get_config_file(f"Shapes/{config}.yaml")
        return Training(name, folder, path, opts, program, product)

    def run(self) -> None:
        """Execute all unfinished training runs.

        Raises:
            InputError: if a run failed, after all others have finished.
        """
        if not (self.data / "shapes").exists():
            make_shapes(self.data / "shapes", num_val=NUM_VAL)
        tuned = [self.fine_tuning(d, seed) for seed in self.seeds for d in self.detectors]
        environment = {"DETECTRON2_DATASETS": str(self.data.resolve())}
        for trainings in (self.pretrainings(), tuned):
            failed = run_trainings(trainings, self.output, self.profile.at_once, environment)
            if failed:
                raise InputError(f"{len(failed)} training runs failed, see above")

    def results(self) -> dict[str, Any]:
        """COCO metrics of every run, and the verdicts on every claim."""
        truth = load_coco(self.data / "shapes" / "instances_val.json")
        runs = {
            d.name: [
                Run(d.name, IMAGES, seed, self.fine_tuning(d, seed).folder) for seed in self.seeds
            ]
            for d in self.detectors
        }
        pairs = [(c.above.name, c.below.name) for c in self.profile.claims]
        judged: dict[tuple[str, str], Runs] = {}
        for kind in KINDS:
            judged |= {
                (kind, name): Runs.from_matches(
                    [ImageMatches.from_results(truth, run.detections, kind) for run in mine]
                )
                for name, mine in runs.items()
            }
        verdicts = judge(judged, pairs, KINDS)
        claims = [
            {**claim._asdict(), "above": claim.above.name, "below": claim.below.name, **found}
            for claim, found in zip(self.profile.claims, verdicts, strict=True)
        ]
        return {
            "date": datetime.date.today().isoformat(),
            "seeds": self.seeds,
            "steps": self.profile.steps,
            "opts": self.opts,
            "claims": claims,
            "runs": [
                {**summarize(run, truth), "folder": run.folder.name}
                for mine in runs.values()
                for run in mine
            ],
        }


def aps_of(results: Mapping[str, Any], name: str, kind: str) -> list[float]:
    """AP of a detector for each seed; `kind` is "bbox" or "segm"."""
    return [run[kind]["AP"] for run in results["runs"] if run["norm"] == name]


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of the verdicts, and of the AP of all detectors."""
    first = results["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    facts = (
        f"{results['date']}, {first['device']}, {versions}, seeds {results['seeds']}, "
        f"{results['steps']} steps of {IMAGES} images, {first['git_commit'] or 'no commit'}. "
        "Differences have 95% intervals; verdicts are corrected for their number."
    )
    columns = ["table", "claim", "paper", *(f"{word} AP, verdict" for word in KINDS.values())]
    claims = []
    for c in results["claims"]:
        cells = []
        for word in KINDS.values():
            interval = f"{c[word]['low']:+.1f} to {c[word]['high']:+.1f}"
            cells.append(f"{c[word]['difference']:+.1f} ({interval}), {c[word]['verdict']}")
        claims.append([c["table"], c["sentence"], c["paper"], *cells])
    rows = []
    for name in dict.fromkeys(run["norm"] for run in results["runs"]):
        found = [aps_of(results, name, kind) for kind in KINDS]
        means = [f"{mean(aps):.1f}" for aps in found]
        rows.append([name, *means, *(", ".join(f"{v:.1f}" for v in aps) for aps in found)])
    header = ["detector", "box AP", "mask AP", "box AP of each seed", "mask AP of each seed"]
    return f"{facts}\n\n{markdown_table(columns, claims)}\n{markdown_table(header, rows)}"


def plot(results: Mapping[str, Any]) -> Figure:
    """Plot the differences with their intervals, and box AP by images per pass."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours, markers = {HOLDS: COLOURS[2], FAILS: COLOURS[0]}, {"box": "o", "mask": "s"}
    claims = list(reversed(results["claims"]))
    for y, claim in enumerate(claims):
        for shift, (word, marker) in zip((0.15, -0.15), markers.items(), strict=True):
            c = claim[word]
            colour = colours.get(c["verdict"], "0.5")
            left.plot((c["low"], c["high"]), (y + shift, y + shift), color=colour)
            left.plot(c["difference"], y + shift, marker, color=colour)
    left.set_yticks(range(len(claims)), [c["sentence"] for c in claims], fontsize=8)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("difference in AP, 95% interval: box (circle) and mask (square)")
    lines = {"BN": BN, "GN": dict.fromkeys(BN, GN), "BN*": dict.fromkeys(BN, BN_STAR)}
    for (norm, detectors), colour in zip(lines.items(), COLOURS, strict=False):
        images = [IMAGES // passes for passes in detectors]
        values = [aps_of(results, d.name, "bbox") for d in detectors.values()]
        right.plot(images, [mean(v) for v in values], "-", color=colour, label=norm)
        for n, several in zip(images, values, strict=True):
            right.plot([n] * len(several), several, "o", color=colour, markersize=4)
    right.set_xscale("log", base=2)
    right.set_xticks(images, [str(n) for n in images])
    right.set_xlabel("images per forward pass")
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
    help_ = "random seeds of the training runs (default 0 1 2)"
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help=help_)
    help_ = "folder for data, runs and results (default %(default)s)"
    add("--output-dir", type=Path, default=Path("output/replicate"), metavar="FOLDER", help=help_)
    help_ = "KEY VALUE pairs that override the config of every training run (default: none)"
    add("--opts", nargs=argparse.REMAINDER, default=[], help=help_)
    args = parser.parse_args()
    with exit_on_input_error(), locked(args.output_dir):
        profile = PROFILES[args.profile]
        replication = Replication(args.output_dir, profile, args.seeds, args.opts)
        replication.run()
        results = replication.results()
        with write_whole(args.output_dir / "results.json") as file:
            file.write(json.dumps(results, indent=1) + "\n")
        with write_whole(args.output_dir / "results.md") as file:
            file.write(markdown(results))
        plot(results).savefig(args.output_dir / "results.png", dpi=110)
        print(markdown(results))


if __name__ == "__main__":
    main()
