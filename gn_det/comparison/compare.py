"""Compare norms on a custom dataset: train all norms with the same recipe, and write a report.

There is one training run for each norm, batch size and seed, as a subprocess. The same command
resumes an interrupted comparison: finished runs are kept, and others resume from their last
checkpoint.
"""

import argparse
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.logger import setup_logger

from ..check import check_config
from ..check.anchors import objects_out_of_reach
from ..check.machine import check_machine, check_weights_file
from ..config import add_gn_config, as_opts, default_device, flatten, parse_opts
from ..config_file import add_base_argument, find_config, read_config
from ..data.object_sizes import ObjectSizes
from ..data.prepare import Prepared, keys_of
from ..engine.dataset_args import add_data_arguments, prepare_data
from ..engine.describe import describe_recipe
from ..engine.run_record import RECORD
from ..errors import InputError, exit_on_input_error
from ..evaluation.report import Run, write_report
from ..modeling.norm import NORM_KEYS
from .autoconfig import Proposal, drop_overridden, images_seen, propose_schedule, propose_sizes
from .initial_weights import DISTILL_STEPS, find_weights, missing_facts, weight_keys
from .jobs import Training, run_trainings
from .plan import Cell, check_pairs, describe_norms, make_cells, norm_keys

BASE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_4conv1fc.yaml"
EXAMPLE = "example: gn-det compare --train train.json images/ --norms FrozenBN GN --seeds 0 1"
# Flag -> the config keys that it sets
FLAG_KEYS = {
    "--norms": tuple(NORM_KEYS.values()),
    "--images-per-batch": ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"),
    "--budget": ("SOLVER.MAX_ITER", "SOLVER.STEPS"),
    "--seeds": ("SEED",),
    "--init": ("MODEL.WEIGHTS",),
    "--output-dir": ("OUTPUT_DIR",),
    "--train": ("DATASETS.TRAIN",),
    "--val": ("DATASETS.TEST",),
}


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first training run starts.

    Args:
        output: the folder of the comparison.
        data: the prepared training and validation set.
        cells: the training run of each cell.
        notes: changes of the recipe and their reasons, as lines of text.
    """

    output: Path
    data: Prepared
    cells: dict[Cell, Training]
    notes: list[str]


def make_plan(args: argparse.Namespace) -> Plan:
    """Prepare the data, adapt the recipe to it, choose weights, and check every training run.

    Args:
        args: as `parse` returns them.

    Raises:
        InputError: for errors that would corrupt training, or runs that differ in more than the
            norm.
    """
    cells = make_cells(args.norms, args.images_per_batch, args.seeds)
    check_overrides(args.opts)
    opts = ["MODEL.DEVICE", default_device(), *args.opts]
    config = find_config(args.base)
    base = read_config(config, opts, args.allow_remote_base)
    runs = args.output_dir / "runs"
    data = prepare_data(args, base, args.output_dir / "data", runs.exists())
    sizes = ObjectSizes.of(Path(data.train))
    recipes = fit_recipes(base, sizes, args.images_per_batch, args.budget, opts)
    # --check needs converted files, but not their quality
    steps = 0 if args.check else DISTILL_STEPS
    folder = args.output_dir / "backbones"
    weights = find_weights(args.norms, args.init, base, list_images(data), folder, steps)
    shared = keys_of(data, base)
    trainings = {}
    for cell in cells:
        keys = {
            **shared,
            **{proposal.key: proposal.value for proposal in recipes[cell.images]},
            **norm_keys(cell.norm, base),
            **weight_keys(weights[cell.norm]),
            "SEED": cell.seed,
            "OUTPUT_DIR": str((runs / cell.folder).resolve()),
        }
        # The user's pairs come last, so that they override the rest
        words, remote = (*as_opts(keys), *opts), args.allow_remote_base
        output = Path(keys["OUTPUT_DIR"])
        trainings[cell] = Training(str(cell), output, config, words, allow_remote_base=remote)
    check_trainings(trainings)
    proposals = (str(proposal) for recipe in recipes.values() for proposal in recipe)
    notes = list(dict.fromkeys(proposals))
    notes += describe_fallbacks(weights.values(), base)
    notes += objects_out_of_reach(trainings[cells[0]].cfg, sizes)
    return Plan(args.output_dir, data, trainings, notes)


def check_overrides(opts: Sequence[str]) -> None:
    """Refuse `KEY VALUE` pairs whose key is set by a flag.

    Raises:
        InputError: naming the flag.
    """
    if flags := [word for word in opts[::2] if word.startswith("--")]:
        raise InputError(f"{flags[0]}: put all flags before the KEY VALUE pairs")
    given = parse_opts(opts)
    for flag, keys in FLAG_KEYS.items():
        if wrong := [key for key in given if key in keys]:
            raise InputError(f"{wrong[0]} cannot be a KEY VALUE pair: set it with {flag}")


def fit_recipes(
    base: CfgNode,
    sizes: ObjectSizes,
    batches: Sequence[int],
    budget: str | None,
    opts: Sequence[str],
) -> dict[int, list[Proposal]]:
    """The recipe's changes for the dataset, for each batch size.

    Args:
        base: the base config, merged with `opts`.
        sizes: image and object sizes of the training set.
        batches: images per batch.
        budget: as in `images_seen`.
        opts: the user's `KEY VALUE` pairs, which are not changed.
    """
    seen, reason = images_seen(budget, len(sizes.images), max(batches))
    shared = list(propose_sizes(base, sizes, opts))
    return {
        batch: drop_overridden([*shared, *propose_schedule(base, seen, batch, reason)], opts)
        for batch in batches
    }


def list_images(data: Prepared) -> list[Path]:
    """Paths of all training images."""
    entries = json.loads(Path(data.train).read_text())["images"]
    return [Path(entry["file_name"]) for entry in entries]


def check_trainings(trainings: Mapping[Cell, Training]) -> None:
    """Check the weights and config of every cell, and that cells differ only in the norm.

    Raises:
        InputError: naming the cell and the key.
    """
    for cell, training in trainings.items():
        try:
            check_weights_file(training.cfg)
            check_config(training.cfg, num_gpus=1)
        except InputError as error:
            reason = f"{cell}: {error.reason}"
            raise InputError(reason, key=error.key, fix=error.fix) from None
    check_pairs({cell: training.cfg for cell, training in trainings.items()})


def describe_fallbacks(weights: Iterable[str], base: CfgNode) -> Iterator[str]:
    """Lines of text on the facts that a weights file lacks and the config supplies."""
    for file in dict.fromkeys(weights):
        for key, value in missing_facts(file, base).items():
            yield f"{key} {value}: from the config, as {Path(file).name} does not record it"


def base_config() -> CfgNode:
    """All config keys with their defaults."""
    cfg = get_cfg()
    add_gn_config(cfg)
    return cfg


def save_best(plan: Plan, results: Mapping[str, Any]) -> Path:
    """Copy the best model to `OUTPUT/best`, with the files that `DefaultPredictor` needs."""
    best = plan.output / "best"
    source = Path(results["best"]["folder"])
    best.mkdir(exist_ok=True)
    for name in ("model_final.pth", RECORD):
        shutil.copy2(source / name, best / name)
    cfg = read_config(str(source / "config.yaml"))
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str((best / "model_final.pth").resolve())
    cfg.OUTPUT_DIR = str(best.resolve())
    (best / "config.yaml").write_text(cfg.dump())
    return best


def report(plan: Plan, failed: Mapping[str, str], command: str) -> None:
    """Write the report on all finished runs, and copy the best model.

    Args:
        plan: of the comparison.
        failed: {name of a failed run: error message}.
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
    base = next(iter(plan.cells.values())).config_file
    facts: dict[str, Any] = {"command": command, "recipe": [base, *plan.notes]}
    facts["noticed in the data"] = findings or ["nothing"]
    if failed:
        facts["failed"] = [f"{name}: {reason}" for name, reason in failed.items()]
    title = " against ".join(dict.fromkeys(run.norm for run in runs))
    about = {"title": title, "text": "", "facts": facts}
    results = write_report(runs, Path(plan.data.val), plan.output, about)
    print(f"\n{results['answer']}\n")
    best = save_best(plan, results)
    print(f"report      {plan.output / 'report.html'}\nbest model  {best}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=EXAMPLE)
    add_data_arguments(parser, required=True)
    add = parser.add_argument
    help_ = "norms of the backbone, or BACKBONE/HEADS; first the baseline (default FrozenBN GN)"
    add("--norms", nargs="+", default=["FrozenBN", "GN"], metavar="NORM", help=help_)
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
    add_base_argument(parser)
    help_ = "training runs in parallel, each on its own GPU (default %(default)s)"
    add("--num-gpus", type=int, default=1, metavar="N", help=help_)
    help_ = "folder for data, runs and report (default %(default)s)"
    add("--output-dir", type=Path, default=Path("output/compare"), metavar="FOLDER", help=help_)
    add("--check", action="store_true", help="check the data and print the plan without training")
    add("opts", nargs="*", help="KEY VALUE pairs that override the config of every run")
    words = list(sys.argv[1:] if argv is None else argv)
    # A flag with several values would take the first KEY as another value
    known = {*flatten(base_config())}
    first = next((i for i, word in enumerate(words) if word in known), len(words))
    return parser.parse_args([*words[:first], "--", *words[first:]])


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command `gn-det compare`, which is also `tools/compare.py`."""
    args = parse(argv)
    setup_logger(name="gn_det")
    logging.getLogger("fvcore").setLevel(logging.WARNING)
    with exit_on_input_error():
        plan = make_plan(args)
        print("\n".join(["", "adapted to the dataset", *(f"  {line}" for line in plan.notes)]))
        if args.check:
            for cell, training in plan.cells.items():
                if cell.seed == args.seeds[0]:
                    print(f"\n{cell}\n\n{describe_recipe(training.cfg, 1)}")
            return
        trainings = list(plan.cells.values())
        check_machine(trainings[0].cfg)
        count = torch.cuda.device_count()
        if args.num_gpus > max(count, 1):
            raise InputError(f"--num-gpus {args.num_gpus} must be at most {max(count, 1)}")
        failed = run_trainings(trainings, args.output_dir, max(args.num_gpus, 1))
        command = shlex.join(["python", "tools/compare.py", *(argv or sys.argv[1:])])
        report(plan, failed, command)
        if failed:
            raise InputError(f"{len(failed)} of {len(trainings)} training runs failed, see above")
