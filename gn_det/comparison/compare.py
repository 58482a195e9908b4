"""Compare norms on a custom dataset: train all norms with the same recipe, and write a report.

There is one training run for each norm, batch size and seed, as a subprocess. The same command
resumes an interrupted comparison: finished runs are kept, and others resume from their last
checkpoint.
"""

import argparse
import logging
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

from ..check.machine import check_machine
from ..config import default_config, flatten
from ..config_file import add_base_argument
from ..engine.dataset_args import add_data_arguments
from ..engine.describe import describe_recipe
from ..engine.relative_steps import describe_steps
from ..errors import InputError, exit_on_input_error
from ..evaluation.report import Run, write_report
from ..files import locked
from ..modeling.norm import backbone_norm
from .best import save_best
from .cells import DEFAULT_NORMS, compared_pairs, describe_norms
from .estimate import describe_plan, describe_set
from .initial_weights import conversion_errors
from .jobs import run_trainings
from .plan import Plan, make_plan
from .rates import DEFAULT_RATES, Trial, allows_trials, lower_rates, trial_rows, tune_rates

BASE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_4conv1fc.yaml"
TRIAL_COLUMNS = "norm", "images per batch", "learning rate", "iterations", "box AP", "mask AP"
EXAMPLE = "example: gn-det compare --train train.json images/ --seeds 0 1"


def report(plan: Plan, failed: Mapping[str, str], trials: Sequence[Trial], command: str) -> None:
    """Write the report on all finished runs, and copy the best model.

    Args:
        plan: of the comparison.
        failed: {name of a failed run: error message}.
        trials: of the learning rates; empty if none were tried.
        command: the command line, for the report.

    Raises:
        InputError: if no run finished.
    """
    runs = [
        Run(cell.norm, cell.images, cell.seed, training.folder, describe_norms(training.cfg))
        for cell, training in plan.cells.items()
        if training.name not in failed
    ]
    if not runs:
        raise InputError("all training runs failed, so there is nothing to report: see above")
    findings = [f"{name}: {line}" for name, lines in plan.data.findings.items() for line in lines]
    first = next(iter(plan.cells.values()))
    facts: dict[str, Any] = {"command": command, "recipe": [first.config_file, *plan.notes]}
    for name, path in (("training", plan.data.train), ("validation", plan.data.val)):
        facts[f"{name} set"] = list(describe_set(Path(path)))
    facts["what each norm got"] = list(describe_cells(plan))
    facts["noticed in the data"] = findings or ["nothing"]
    if failed:
        facts["failed"] = [f"{name}: {reason}" for name, reason in failed.items()]
    norms = list(dict.fromkeys(cell.norm for cell in plan.cells))
    about: dict[str, Any] = {"title": " against ".join(norms), "text": "", "facts": facts}
    about |= {"pairs": compared_pairs(norms), "failed": count_failed(plan, failed)}
    about |= {"rates": describe_rates(plan, trials), "tables": list(rate_tables(trials))}
    results = write_report(runs, Path(plan.data.val), plan.output, about)
    print(f"\n{results['answer']}\n")
    best = save_best(plan, results)
    print(f"report      {plan.output / 'report.html'}\nbest model  {best}")


def describe_cells(plan: Plan) -> Iterator[str]:
    """One line for each norm and batch size: learning rate, initial weights and own recipe."""
    for cell, training in plan.cells.items():
        if cell.seed == next(iter(plan.cells)).seed:
            keys = {
                "SOLVER.BASE_LR": training.cfg.SOLVER.BASE_LR,
                "SOLVER.MASK_HEAD_MULTIPLIER": training.cfg.SOLVER.MASK_HEAD_MULTIPLIER,
                "MODEL.WEIGHTS": training.cfg.MODEL.WEIGHTS or '"" (from scratch)',
                **plan.own.get(cell.norm, {}),
                **grouping_of(training.cfg),
            }
            pairs = ", ".join(f"{key} {value}" for key, value in keys.items())
            yield f"{cell.norm}, batch size {cell.images}: {pairs}"
            if errors := conversion_errors(training.cfg.MODEL.WEIGHTS):
                yield f"features of the converted backbone of {cell.norm}, relative error: {errors}"


def grouping_of(cfg: CfgNode) -> dict[str, int]:
    """The keys that set the grouping of a GN backbone; empty for other norms."""
    keys = cfg.MODEL.GROUP_NORM
    if backbone_norm(cfg) != "GN":
        return {}
    key = "DIM_PER_GP" if keys.DIM_PER_GP > 0 else "NUM_GROUPS"
    return {f"MODEL.GROUP_NORM.{key}": keys[key]}


def count_failed(plan: Plan, failed: Mapping[str, str]) -> dict[str, str]:
    """{norm: how many of its runs failed, and the first reason}, in the order of the norms."""
    counts = {}
    for norm in dict.fromkeys(cell.norm for cell in plan.cells):
        names = [training.name for cell, training in plan.cells.items() if cell.norm == norm]
        if reasons := [failed[name] for name in names if name in failed]:
            counts[norm] = f"{len(reasons)} of {len(names)} runs ({reasons[0].splitlines()[0]})"
    return counts


def describe_rates(plan: Plan, trials: Sequence[Trial]) -> str:
    """The learning rates that the result is about, as the end of a sentence."""
    several = len({cell.images for cell in plan.cells}) > 1
    rates = {
        f"{cell.norm}{f' at batch size {cell.images}' * several}": f"{t.cfg.SOLVER.BASE_LR:g}"
        for cell, t in plan.cells.items()
    }
    tried = ", ".join(f"{rate:g}" for rate in sorted({trial.rate for trial in trials}))
    if tried:
        chosen = ", ".join(f"{rate} for {norm}" for norm, rate in rates.items())
        return f"each norm at the best of the learning rates {tried} in trials: {chosen}"
    return f"the learning rate {' and '.join(dict.fromkeys(rates.values()))}; no other was tried"


def rate_tables(trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    """The table of the tried learning rates, for the report."""
    if trials:
        what = f"Short trials of {trials[0].training.cfg.SOLVER.MAX_ITER} iterations"
        if any(trial.final for trial in trials):
            what += ", and trials of the whole schedule at the best rates of these"
        yield {
            "title": "Learning rates tried",
            "text": f"{what}, with the first seed, on a part of the training images, evaluated on "
            "the others. The validation images had no part in the choice.",
            "header": [*TRIAL_COLUMNS, ""],
            "rows": list(trial_rows(trials)),
        }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=EXAMPLE)
    add_data_arguments(parser, required=True)
    add = parser.add_argument
    help_ = "norms of the backbone, or BACKBONE/HEADS; first the baseline "
    help_ += f"(default {' '.join(DEFAULT_NORMS)})"
    add("--norms", nargs="+", default=[*DEFAULT_NORMS], metavar="NORM", help=help_)
    help_ = "images per training step, in total (default 2)"
    add("--images-per-batch", nargs="+", type=int, default=[2], metavar="N", help=help_)
    help_ = "random seeds; every norm is trained with each (default 0 1 2)"
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help=help_)
    add("--base", default=BASE, metavar="CONFIG", help="recipe of all runs (default %(default)s)")
    help_ = "initial weights, or NORM=WEIGHTS; a BN backbone is converted for GN "
    help_ += "(default: the base config's weights)"
    add("--init", nargs="+", default=[], metavar="CHECKPOINT", help=help_)
    help_ = "iterations of the largest batch, as 5000, or epochs, as 24epochs "
    help_ += "(default: from the number of training images)"
    add("--budget", metavar="ITERS|EPOCHS", help=help_)
    help_ = "multiples of the linear rule's learning rate to try with each norm; 1 tries none "
    help_ += f"(default {' '.join(f'{r:g}' for r in DEFAULT_RATES)} if short trials add at most "
    help_ += "two thirds of the iterations and SOLVER.BASE_LR is not given)"
    add("--rates", nargs="+", type=positive, metavar="FACTOR", help=help_)
    add_base_argument(parser)
    help_ = "training runs in parallel, each on its own GPU (default %(default)s)"
    add("--num-gpus", type=int, default=1, metavar="N", help=help_)
    help_ = "folder for data, runs and report (default %(default)s)"
    add("--output-dir", type=Path, default=Path("output/compare"), metavar="FOLDER", help=help_)
    add("--check", action="store_true", help="check the data and print the plan without training")
    add("opts", nargs="*", help="KEY VALUE pairs that override the config of every run")
    words = list(sys.argv[1:] if argv is None else argv)
    # A flag with several values would take the first KEY as another value
    known = {*flatten(default_config())}
    first = next((i for i, word in enumerate(words) if word in known), len(words))
    return parser.parse_args([*words[:first], "--", *words[first:]])


def positive(word: str) -> float:
    """Parse a positive number of the command line."""
    if not 0 < (number := float(word)) < math.inf:
        raise ValueError(word)
    return number


def rate_factors(args: argparse.Namespace, plan: Plan) -> tuple[float, ...]:
    """The multiples of the linear rule's learning rate to try; fewer than 2 means no trials."""
    if args.rates is not None:
        return tuple(args.rates)
    own_rate = "SOLVER.BASE_LR" in args.opts[::2]
    return DEFAULT_RATES if not own_rate and allows_trials(plan) else ()


def print_plan(plan: Plan, factors: Sequence[float]) -> None:
    """Print the recipe of each norm and batch size, the data, and the expected cost."""
    first = next(iter(plan.cells)).seed
    for cell, training in plan.cells.items():
        if cell.seed == first:
            print(f"\n{cell}\n\n{describe_recipe(training.cfg, 1)}", flush=True)
            print(describe_steps(training.cfg), flush=True)
    print(f"\nthis comparison\n\n{describe_plan(plan, factors)}")


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command `gn-det compare`, which is also `tools/compare.py`."""
    args = parse(argv)
    setup_logger(name="gn_det")
    logging.getLogger("fvcore").setLevel(logging.WARNING)
    with exit_on_input_error(), locked(args.output_dir):
        plan = make_plan(args)
        print("\n".join(["", "adapted to the dataset", *(f"  {line}" for line in plan.notes)]))
        factors = rate_factors(args, plan)
        if args.check:
            return print_plan(plan, factors)
        execute(args, plan, factors, shlex.join(argv or sys.argv[1:]))


def execute(args: argparse.Namespace, plan: Plan, factors: Sequence[float], arguments: str) -> None:
    """Try the learning rates, execute all training runs, and write the report.

    Args:
        args: as `parse` returns them.
        plan: of the comparison.
        factors: as `rate_factors` returns them.
        arguments: of the command line, for the report.

    Raises:
        InputError: if the machine cannot run the plan, or a run fails.
    """
    check_machine(next(iter(plan.cells.values())).cfg)
    count = torch.cuda.device_count()
    if args.num_gpus > max(count, 1):
        raise InputError(f"--num-gpus {args.num_gpus} must be at most {max(count, 1)}")
    at_once = max(args.num_gpus, 1)
    plan, trials = tune_rates(plan, factors, args.group_by, at_once, optional=args.rates is None)
    if trials:
        rows = ("  ".join(f"{cell:12}" for cell in row) for row in trial_rows(trials))
        print("\n".join(["", "learning rates tried", "", *rows, ""]), flush=True)
    trainings = list(plan.cells.values())
    failed = run_trainings(trainings, args.output_dir, at_once)
    while failed and (lower := lower_rates(plan, trials, failed)):
        plan, trainings = lower, list(lower.cells.values())
        print("\nruns diverged, so their norms get the next lower learning rate\n", flush=True)
        failed = run_trainings(trainings, args.output_dir, at_once)
    report(plan, failed, trials, f"python tools/compare.py {arguments}")
    if failed:
        raise InputError(f"{len(failed)} of {len(trainings)} training runs failed, see above")
