"""Training and evaluation from the command line, as `tools/train_net.py` runs it."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import detectron2
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..check import ConfigError
from ..check.weights import check_weights
from ..config import add_gn_config
from ..data.prepare import register
from ..errors import InputError, exit_on_input_error
from ..model_zoo import get_config_file
from .dataset_args import add_data_arguments, data_opts, describe_data
from .describe import describe_recipe
from .distributed import count_processes, joined, launch, restarted
from .train_step import anywhere
from .trainer import Trainer

# What Detectron2 raises for configs that make no sense, and files that are none
CONFIG_ERRORS = (
    *(AssertionError, AttributeError, LookupError, OSError, RecursionError, TypeError),
    *(ValueError, yaml.YAMLError),
)


def read_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config that `args.config_file` and the `KEY VALUE` pairs of `args.opts` describe.

    A batch size among the pairs is meant as it stands, as in Detectron2's own configs, and switches
    the scaling by `SOLVER.REFERENCE_WORLD_SIZE` off, unless that is among them too.

    Raises:
        InputError: for a file that does not exist, and keys or values that do not fit.
    """
    cfg = get_cfg()
    add_gn_config(cfg)
    path = find_config(args.config_file)
    try:
        refuse_code(path)
        cfg.merge_from_file(path)
        cfg.merge_from_list(args.opts)
        register((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        if "SOLVER.IMS_PER_BATCH" in args.opts and "SOLVER.REFERENCE_WORLD_SIZE" not in args.opts:
            cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    except InputError:
        raise
    except CONFIG_ERRORS as error:
        told = " ".join(str(error).split())
        raise InputError(f"config {path} with {args.opts}: {told}") from None
    cfg.freeze()
    return cfg


def refuse_code(path: str, derived: tuple[str, ...] = ()) -> None:
    """Refuse a config that would run code on being read, itself or one that it is based on.

    Detectron2's own may: some of them compute their anchors.

    Args:
        derived: the configs that are based on this one.

    Raises:
        InputError: for such a config, and for one that is based on itself.
    """
    if path in derived:
        raise InputError(f"config {path} is based on itself, by _BASE_")
    with PathManager.open(path) as file:
        try:
            content = yaml.safe_load(file)
        except yaml.constructor.ConstructorError as error:
            package = Path(detectron2.__file__).resolve().parent
            own = (package, package.parent / "configs")  # the latter in a checkout
            if any(folder in Path(path).resolve().parents for folder in own):
                return
            mark = error.problem_mark
            raise InputError(
                f"config {path} would run code, at line {mark.line + 1}: write its values out"
            ) from None
    bases = content.get("_BASE_", []) if isinstance(content, dict) else []
    for base in bases if isinstance(bases, list) else [bases]:
        base = os.path.expanduser(base)
        beside = base if "://" in base else os.path.join(os.path.dirname(path), base)
        refuse_code(beside, (*derived, path))


def find_config(name: str) -> str:
    """The path of a config file, which may be named as those of `configs/` are there."""
    return name if os.path.isfile(name) else get_config_file(name)


def setup(args: argparse.Namespace) -> CfgNode:
    """The config, with Detectron2's loggers, `config.yaml` and seed set up for it."""
    cfg = read_config(args)
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
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    with exit_on_input_error():
        args.config_file = find_config(args.config_file)
        if args.skip_bad_batches is not None:
            args.opts = ["SOLVER.SKIP_BAD_BATCHES", str(args.skip_bad_batches), *args.opts]
        cfg = read_config(args)
        with joined(cfg.MODEL.DEVICE):
            _run(args, cfg, trainer_class)


def _run(args: argparse.Namespace, cfg: CfgNode, trainer_class: type[Trainer]) -> None:
    """Check what can be checked in one process, then train or evaluate in all."""
    num_gpus = count_processes(args)
    # On some machines torchrun may count no restart
    args.resume = anywhere(args.resume or (restarted() and not args.eval_only))
    opts = data_opts(args, cfg) if comm.is_main_process() else []
    args.opts = [*comm.all_gather(opts)[0], *args.opts]
    cfg = read_config(args)
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
