"""Would GN help on these pictures? Norms x batch sizes x seeds, trained alike, and their report.

Every training is one of `tools/train_net.py`'s, in a process of its own. What is finished is kept:
the same command goes on where it was interrupted, in the middle of a training too.
"""

import argparse
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.logger import setup_logger

from ..check import check_config
from ..check.anchors import objects_out_of_reach
from ..check.machine import check_machine, check_weights_file
from ..config import add_gn_config, as_opts, default_device, flatten
from ..config_file import add_base_argument, find_config, read_config
from ..data.object_sizes import ObjectSizes
from ..data.prepare import Prepared, keys_of
from ..engine.dataset_args import add_data_arguments, prepare_data
from ..engine.describe import describe_recipe
from ..engine.run_record import RECORD
from ..errors import InputError, exit_on_input_error
from ..evaluation.report import Run, write_report
from ..modeling.norm import NORM_KEYS
from .autoconfig import Proposal, chosen, images_seen, propose_schedule, propose_sizes
from .initial_weights import DISTILL_STEPS, find_weights, untold_keys, weight_keys
from .jobs import Training, run_trainings
from .plan import Cell, check_pairs, describe_norms, norm_keys, plan

BASE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_4conv1fc.yaml"
# Flag -> the keys that it decides
DECIDED = {
    "--norms": tuple(NORM_KEYS.values()),
    "--images-per-batch": ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"),
    "--budget": ("SOLVER.MAX_ITER", "SOLVER.STEPS"),
    "--seeds": ("SEED",),
    "--init": ("MODEL.WEIGHTS",),
    "--output-dir": ("OUTPUT_DIR",),
    "--train": ("DATASETS.TRAIN",),
    "--val": ("DATASETS.TEST",),
}


@dataclass
class Comparison:
    """All that is decided before the first training.

    Args:
        cells: what is trained, and how.
        proposals: what was made to fit, in words.
    """

    output: Path
    data: Prepared
    cells: dict[Cell, Training] = field(default_factory=dict)
    proposals: list[str] = field(default_factory=list)


def prepare_comparison(args: argparse.Namespace) -> Comparison:
    """Look at the data, fit the recipe to it, and check every training that is to come.

    Raises:
        InputError: for anything that would train wrongly, or differ in more than the norm.
    """
    cells = plan(args.norms, args.images_per_batch, args.seeds)
    refuse_decided(args.opts)
    opts = ["MODEL.DEVICE", default_device(), *args.opts]
    output, config = args.output_dir, find_config(args.base)
    base = read_config(config, opts, args.allow_remote_base)
    data = prepare_data(args, base, output / "data", (output / "runs").exists())
    train = Path(data.train)
    sizes = ObjectSizes.of(train)
    recipes = fit_recipes(base, sizes, args, opts)
    told = dict.fromkeys(str(proposal) for recipe in recipes.values() for proposal in recipe)
    found = Comparison(output, data, proposals=list(told))
    weights = initial_weights(args, base, train)
    found.proposals += untold_facts(weights.values(), base)
    shared = keys_of(data, base)
    for cell in cells:
        keys = {
            **shared,
            **{proposal.key: proposal.value for proposal in recipes[cell.images]},
            **norm_keys(cell.norm, base),
            **weight_keys(weights[cell.norm]),
            "SEED": cell.seed,
            "OUTPUT_DIR": str((output / "runs" / cell.folder).resolve()),
        }
        # What the user gives comes last, and counts
        words = (*as_opts(keys), *opts)
        remote = args.allow_remote_base
        folder = Path(keys["OUTPUT_DIR"])
        training = Training(str(cell), folder, config, words, allow_remote_base=remote)
        found.cells[cell] = training
        try:
            check_weights_file(training.cfg)
            check_config(training.cfg, num_gpus=1)
        except InputError as error:
            raise InputError(f"{cell}: {error}") from None
    check_pairs({cell: training.cfg for cell, training in found.cells.items()})
    found.proposals += objects_out_of_reach(found.cells[cells[0]].cfg, sizes)
    return found


def fit_recipes(
    base: CfgNode, sizes: ObjectSizes, args: argparse.Namespace, opts: Sequence[str]
) -> dict[int, list[Proposal]]:
    """What is made to fit the data, for each batch size; keys among `opts` are left to these."""
    batches = args.images_per_batch
    seen, why = images_seen(args.budget, len(sizes.pictures), max(batches))
    shared = list(propose_sizes(base, sizes, opts))
    return {
        batch: chosen([*shared, *propose_schedule(base, seen, batch, why)], opts)
        for batch in batches
    }


def initial_weights(args: argparse.Namespace, base: CfgNode, train: Path) -> dict[str, str]:
    """Where each norm starts, on files that are made from a BN backbone if need be."""
    entries = json.loads(train.read_text())["images"]
    pictures = [Path(entry["file_name"]) for entry in entries]
    # A plan needs the file of a backbone, but not its quality
    steps = 0 if args.check else DISTILL_STEPS
    folder = args.output_dir / "backbones"
    return find_weights(args.norms, args.init, base, pictures, folder, steps)


def untold_facts(weights: Iterable[str], base: CfgNode) -> Iterator[str]:
    """What is taken from the config, since initial weights do not tell it, in words."""
    for file in dict.fromkeys(weights):
        for key, value in untold_keys(file, base).items():
            yield f"{key} {value}: the config's, since {Path(file).name} does not tell its own"


def refuse_decided(opts: Sequence[str]) -> None:
    """Refuse `KEY VALUE` pairs whose key a flag decides.

    Raises:
        InputError: naming the flag.
    """
    if flags := [word for word in opts[::2] if word.startswith("--")]:
        raise InputError(f"{flags[0]}: flags stand before the KEY VALUE pairs")
    if len(opts) % 2:
        raise InputError(f"{opts[-1]} has no value: give KEY VALUE pairs")
    for flag, keys in DECIDED.items():
        if wrong := [key for key in opts[::2] if key in keys]:
            raise InputError(f"{wrong[0]} differs between the trainings: give {flag} instead")


def base_config() -> CfgNode:
    """All keys that there are, with their defaults."""
    cfg = get_cfg()
    add_gn_config(cfg)
    return cfg


def keep_best(found: Comparison, results: Mapping[str, Any]) -> Path:
    """Copy the best model, with all that `DefaultPredictor` needs, to `OUTPUT/best`."""
    best = found.output / "best"
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


def report(found: Comparison, failed: Mapping[str, str], command: str) -> None:
    """Write the report of all finished cells, and keep the best model."""
    runs = [
        Run(cell.norm, cell.images, cell.seed, training.folder, describe_norms(training.cfg))
        for cell, training in found.cells.items()
        if training.name not in failed
    ]
    if not runs:
        raise InputError("no training came to its end, so there is nothing to report")
    noticed = [f"{name}: {line}" for name, lines in found.data.findings.items() for line in lines]
    base = next(iter(found.cells.values())).config_file
    facts: dict[str, Any] = {"command": command, "recipe": [base, *found.proposals]}
    facts["noticed in the data"] = noticed or ["nothing"]
    if failed:
        facts["failed"] = [f"{name}: {why}" for name, why in failed.items()]
    title = " against ".join(dict.fromkeys(run.norm for run in runs))
    about = {"title": title, "text": "", "facts": facts}
    results = write_report(runs, Path(found.data.val), found.output, about)
    print(f"\n{results['answer']}\n")
    best = keep_best(found, results)
    print(f"report      {found.output / 'report.html'}\nbest model  {best}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    add = parser.add_argument
    help_ = "of the backbone, or BACKBONE/HEADS; the first is the baseline"
    add("--norms", nargs="+", default=["FrozenBN", "GN"], metavar="NORM", help=help_)
    add("--images-per-batch", nargs="+", type=int, default=[2], metavar="N")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    add("--base", default=BASE, metavar="CONFIG", help=f"recipe of all (default {BASE})")
    help_ = "initial weights, or NORM=WEIGHTS; a BN backbone is converted for GN"
    add("--init", nargs="+", default=[], metavar="CHECKPOINT", help=help_)
    help_ = "iterations of the largest batch, or epochs as 24epochs; by the number of pictures"
    add("--budget", metavar="ITERS|EPOCHS", help=help_)
    add_base_argument(parser)
    add("--num-gpus", type=int, default=1, metavar="N", help="trainings at once, one on each")
    add("--output-dir", type=Path, default=Path("output/compare"), metavar="FOLDER")
    add("--check", action="store_true", help="look at the data and print the plan, train nothing")
    add("opts", nargs="*", help="KEY VALUE pairs, for every training")
    words = list(sys.argv[1:] if argv is None else argv)
    # Flags that take several values would take the first key for another
    known = {*flatten(base_config())}
    first = next((i for i, word in enumerate(words) if word in known), len(words))
    args = parser.parse_args([*words[:first], "--", *words[first:]])
    if not args.train:
        parser.error("--train JSON IMAGES is needed")
    return args


def run(argv: Sequence[str] | None = None) -> None:
    """The whole of `tools/compare.py`."""
    args = parse(argv)
    setup_logger(name="gn_det")
    logging.getLogger("fvcore").setLevel(logging.WARNING)
    with exit_on_input_error():
        found = prepare_comparison(args)
        print("\n".join(["", "made to fit", *(f"  {line}" for line in found.proposals)]))
        if args.check:
            for cell, training in found.cells.items():
                if cell.seed == args.seeds[0]:
                    print(f"\n{cell}\n\n{describe_recipe(training.cfg, 1)}")
            return
        trainings = list(found.cells.values())
        check_machine(trainings[0].cfg)
        if args.num_gpus > max(torch.cuda.device_count(), 1):
            count = torch.cuda.device_count()
            raise InputError(f"--num-gpus {args.num_gpus}, but PyTorch sees {count}")
        failed = run_trainings(trainings, args.output_dir, max(args.num_gpus, 1))
        command = shlex.join(["python", "tools/compare.py", *(argv or sys.argv[1:])])
        report(found, failed, command)
        if failed:
            raise InputError(f"{len(failed)} of {len(trainings)} trainings failed, see above")
