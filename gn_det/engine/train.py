"""Training and evaluation from the command line: `gn-det train` and `tools/train_net.py`."""

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..check import ConfigError
from ..check.evaluation import check_evaluation
from ..check.schedule import unscaled_batch
from ..check.weights import check_weights
from ..config_file import (
    add_base_argument,
    dump_config,
    find_config,
    override_config,
    read_config,
)
from ..data.prepare import register
from ..errors import InputError, exit_on_input_error
from ..files import locked, write_whole
from ..processes import end_with_parent
from .dataset_args import add_data_arguments, data_opts, describe_data
from .describe import describe_recipe, logging_disabled
from .distributed import count_processes, launch, restarted_by_torchrun, torchrun_process_group
from .relative_steps import describe_steps
from .resume import check_resumed_config
from .run_record import check_trained_classes
from .train_step import any_process
from .trainer import Trainer

# Environment variable with the process ID of the command that started this one, and ends with it
PARENT = "GN_DET_PARENT"
DESCRIPTION = "Train or evaluate a detector with Group Normalization or another norm."
EXAMPLE = "--config-file configs/Shapes/mask_rcnn_R_18_FPN_gn.yaml MODEL.DEVICE cpu"
# Help texts of Detectron2's flags, with defaults
DETECTRON2_HELP = {
    "config_file": "config file: a path, or a path below configs/ (required)",
    "resume": "resume from the last checkpoint in OUTPUT_DIR (default: start from MODEL.WEIGHTS)",
    "eval_only": "evaluate MODEL.WEIGHTS, or with --resume the last checkpoint (default: train)",
    "num_gpus": "number of GPUs per machine (default: %(default)s)",
    "num_machines": "number of machines (default: %(default)s)",
    "machine_rank": "rank of this machine, starting at 0 (default: %(default)s)",
    "dist_url": "address for torch.distributed (default: %(default)s)",
    "opts": "KEY VALUE overrides of the config, at the end of the command (default: none)",
}


def setup(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Set up Detectron2's loggers, write `config.yaml`, and set the random seed."""
    # A spawned process does not inherit the datasets that its parent registered
    register((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    default_setup(cfg, args)
    if comm.is_main_process():
        with write_whole(Path(cfg.OUTPUT_DIR) / "config.yaml") as file:
            file.write(dump_config(cfg))
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gn_det")


def main(args: argparse.Namespace, trainer_class: type[Trainer], cfg: CfgNode) -> dict | None:
    """Train, or evaluate with `--eval-only`; `run` calls it in each process after its checks.

    Args:
        args: the command-line flags.
        trainer_class: the trainer.
        cfg: the config, with all overrides.

    Returns:
        the results of the evaluation with `--eval-only`, else those of `DefaultTrainer.train`.
    """
    if multiprocessing.parent_process() is not None:
        end_with_parent()
    setup(args, cfg)
    if args.eval_only:
        return trainer_class.evaluate(cfg, args.resume)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(
    argv: Sequence[str] | None = None,
    trainer_class: type[Trainer] = Trainer,
    description: str = DESCRIPTION,
    example: str = EXAMPLE,
) -> None:
    """Run the command, with Detectron2's flags, launcher and `KEY VALUE` overrides.

    Args:
        argv: the command-line arguments; defaults to `sys.argv[1:]`.
        trainer_class: the trainer.
        description: one sentence for `--help`.
        example: arguments of the example in `--help`.

    Raises:
        SystemExit: with a message, for an `InputError`.
    """
    args = _parse(argv, description, example)
    if parent := os.environ.pop(PARENT, ""):
        end_with_parent(int(parent))
    with exit_on_input_error():
        args.config_file = find_config(args.config_file)
        if args.skip_bad_batches is not None:
            args.opts = ["SOLVER.SKIP_BAD_BATCHES", str(args.skip_bad_batches), *args.opts]
        cfg = read_config(args.config_file, args.opts, args.allow_remote_base)
        with torchrun_process_group(cfg.MODEL.DEVICE):
            _run(args, cfg, trainer_class)


def _parse(argv: Sequence[str] | None, description: str, example: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = default_argument_parser(epilog=f"example:\n  %(prog)s {example}")
    parser.description = description
    for action in parser._actions:
        action.help = DETECTRON2_HELP.get(action.dest, action.help)
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the config and print a summary of the recipe without training (default: train)",
    )
    parser.add_argument(
        "--skip-bad-batches",
        type=int,
        metavar="N",
        help="skip up to N batches with unreadable images, Inf or NaN; the next one aborts the run "
        "(default: SOLVER.SKIP_BAD_BATCHES of the config, 0)",
    )
    add_base_argument(parser)
    add_data_arguments(parser)
    return parser.parse_args(argv)


def _run(args: argparse.Namespace, cfg: CfgNode, trainer_class: type[Trainer]) -> None:
    """Run all checks that need one process only, then train or evaluate in all processes."""
    num_gpus = count_processes(args)
    # With several machines, torchrun may count a restart on some of them only
    args.resume = any_process(args.resume or (restarted_by_torchrun() and not args.eval_only))
    opts = data_opts(args, cfg, num_gpus) if comm.is_main_process() else []
    if opts := comm.all_gather(opts)[0]:
        args.opts = [*opts, *args.opts]
        cfg = override_config(cfg, args.opts, args.config_file)
    trainer_class.check_architecture(cfg)
    if not args.eval_only:
        trainer_class.check_recipe(cfg, num_gpus)
    elif problems := [*check_weights(cfg), *check_evaluation(cfg)]:
        raise ConfigError(problems)
    if comm.is_main_process() and not args.eval_only and args.config_file:
        with logging_disabled():  # its warnings have been logged already
            before = read_config(args.config_file, (), args.allow_remote_base)
        if warning := unscaled_batch(before, cfg, args.opts[::2]):
            print(f"warning: {warning}", flush=True)
    if args.check and not comm.is_main_process():
        return
    if args.check:
        print(f"{args.config_file}\n\n{describe_recipe(cfg, num_gpus)}", flush=True)
        print(describe_steps(cfg))
        print("\n".join(["", *describe_data(cfg)]))
        return
    if args.eval_only and not (cfg.MODEL.WEIGHTS or args.resume):
        raise InputError("--eval-only would evaluate random weights: set MODEL.WEIGHTS")
    trainer_class.check_inputs(cfg, args.eval_only)
    if args.resume and not args.eval_only:
        check_resumed_config(cfg)
    if args.eval_only:
        folder = cfg.OUTPUT_DIR if args.resume else os.path.dirname(cfg.MODEL.WEIGHTS)
        check_trained_classes(Path(folder), cfg)
    # One training run owns its folder; an evaluation may run beside it
    owned = not args.eval_only and args.machine_rank == 0 and comm.is_main_process()
    with locked(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR") if owned else nullcontext():
        launch(main, args, trainer_class, cfg)


if __name__ == "__main__":
    run()
