"""Training and evaluation from the command line, as `tools/train_net.py` runs it."""

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..check import ConfigError
from ..check.weights import check_weights
from ..config_file import add_base_argument, find_config, read_config
from ..errors import InputError, exit_on_input_error
from .dataset_args import add_data_arguments, data_opts, describe_data
from .describe import describe_recipe
from .distributed import count_processes, joined, launch, restarted
from .train_step import anywhere
from .trainer import Trainer


def setup(args: argparse.Namespace) -> CfgNode:
    """The config, with Detectron2's loggers, `config.yaml` and seed set up for it."""
    cfg = read_config(args.config_file, args.opts, args.allow_remote_base)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gn_det")
    return cfg


def main(args: argparse.Namespace, trainer_class: type[Trainer]) -> dict | None:
    """Train, or evaluate with `--eval-only`, in this process; one call a GPU, after `run`'s checks.

    Returns:
        the evaluation's results with `--eval-only`, else what `DefaultTrainer.train` returns.
    """
    cfg = setup(args)
    if args.eval_only:
        return trainer_class.evaluate(cfg, args.resume)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(argv: Sequence[str] | None = None, trainer_class: type[Trainer] = Trainer) -> None:
    """The whole of `tools/train_net.py`: Detectron2's flags, launcher and `KEY VALUE` overrides."""
    parser = default_argument_parser()
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the config and print its recipe, without training",
    )
    parser.add_argument(
        "--skip-bad-batches",
        type=int,
        metavar="N",
        help="batches with unreadable pictures, infinite numbers or NaN to pass over before one "
        "stops the training (SOLVER.SKIP_BAD_BATCHES)",
    )
    add_base_argument(parser)
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    with exit_on_input_error():
        args.config_file = find_config(args.config_file)
        if args.skip_bad_batches is not None:
            args.opts = ["SOLVER.SKIP_BAD_BATCHES", str(args.skip_bad_batches), *args.opts]
        cfg = read_config(args.config_file, args.opts, args.allow_remote_base)
        with joined(cfg.MODEL.DEVICE):
            _run(args, cfg, trainer_class)


def _run(args: argparse.Namespace, cfg: CfgNode, trainer_class: type[Trainer]) -> None:
    """Check what can be checked in one process, then train or evaluate in all."""
    num_gpus = count_processes(args)
    # On some machines torchrun may count no restart
    args.resume = anywhere(args.resume or (restarted() and not args.eval_only))
    opts = data_opts(args, cfg) if comm.is_main_process() else []
    args.opts = [*comm.all_gather(opts)[0], *args.opts]
    cfg = read_config(args.config_file, args.opts, args.allow_remote_base)
    trainer_class.check_architecture(cfg)
    if not args.eval_only:
        trainer_class.check_recipe(cfg, num_gpus)
    elif problems := list(check_weights(cfg)):
        raise ConfigError(problems)
    if args.check and not comm.is_main_process():
        return
    if args.check:
        print(f"{args.config_file}\n\n{describe_recipe(cfg, num_gpus)}")
        print("\n".join(["", *describe_data(cfg)]))
        return
    if args.eval_only and not (cfg.MODEL.WEIGHTS or args.resume):
        raise InputError("--eval-only would evaluate random weights: give MODEL.WEIGHTS")
    trainer_class.check_inputs(cfg, args.eval_only)
    launch(main, args, trainer_class)


if __name__ == "__main__":
    run()
