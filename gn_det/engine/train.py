"""Training and evaluation by Detectron2's own trainer, as `tools/train_net.py` runs it."""

import argparse
import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    default_argument_parser,
    default_setup,
    launch,
)
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim import Optimizer
from yaml import YAMLError

from ..check import ConfigError, check_config
from ..check.weights import check_weights
from ..checkpoint.checkpointer import StrictCheckpointer
from ..config import add_gn_config, is_pretraining
from ..data import check_dataset
from ..data.prepare import register
from ..errors import InputError, exit_on_input_error
from ..model_zoo import get_config_file
from ..solver import build_optimizer
from .accumulate import accumulate_gradients
from .own_data import add_data_arguments, data_opts, describe_data
from .recipe import describe_recipe
from .run_record import RunRecorder


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with COCO evaluation and the decay rule of norm parameters.

    Raises:
        ConfigError: an `InputError`, for a config that `gn_det.check_config` refuses.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.check_architecture(cfg)
        self.check_recipe(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        # As Detectron2 does for its own logger, where `setup` was not called
        if not logging.getLogger("gn_det").isEnabledFor(logging.INFO):
            setup_logger(name="gn_det")
        super().__init__(cfg)

    @classmethod
    def check_architecture(cls, cfg: CfgNode) -> None:
        """Refuse a config that another trainer is for.

        Raises:
            InputError: naming the tool that takes it.
        """
        if is_pretraining(cfg):
            raise InputError("this config pretrains a classifier: run tools/pretrain_net.py")

    @classmethod
    def check_recipe(cls, cfg: CfgNode, num_gpus: int | None = None) -> None:
        """Refuse a config that would train wrongly, as `gn_det.check_config` does."""
        check_config(cfg, num_gpus)

    @classmethod
    def check_inputs(cls, cfg: CfgNode, eval_only: bool) -> None:
        """Check what can be checked before anything is written or built.

        Raises:
            InputError: for a device, data set, weights file or output folder that cannot be used.
        """
        for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
            # Other architectures count their classes under keys of their own
            is_rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
            classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES if is_rcnn else None
            check_dataset(name, classes, annotated=not eval_only)
        check_machine(cfg)

    @classmethod
    def evaluate(cls, cfg: CfgNode, resume: bool) -> dict:
        """Test the model of `MODEL.WEIGHTS`, or of the last checkpoint with `resume`."""
        model = cls.build_model(cfg)
        StrictCheckpointer(model, cfg.OUTPUT_DIR, whole=True).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=resume
        )
        results = cls.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.SOLVER.ACCUMULATE_ITERS > 1:
            accumulate_gradients(model, cfg.SOLVER.ACCUMULATE_ITERS)
        return model

    def build_hooks(self) -> list[HookBase]:
        # Here, since the hooks save by it
        self.checkpointer = StrictCheckpointer(
            self._trainer.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        hooks = super().build_hooks()
        if comm.is_main_process():
            # Before the writers, which come last, so that they write what it records
            hooks.insert(-1, RunRecorder(self.cfg))
        return hooks


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
        cfg.merge_from_file(path)
        cfg.merge_from_list(args.opts)
        register((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        if "SOLVER.IMS_PER_BATCH" in args.opts and "SOLVER.REFERENCE_WORLD_SIZE" not in args.opts:
            cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    except (AssertionError, KeyError, ValueError, YAMLError) as error:
        raise InputError(f"config {path} with {args.opts}: {error}") from None
    cfg.freeze()
    return cfg


def find_config(name: str) -> str:
    """The path of a config file, which may be named as those of `configs/` are there."""
    return name if os.path.isfile(name) else get_config_file(name)


def setup(args: argparse.Namespace) -> CfgNode:
    """The config, with Detectron2's loggers, `config.yaml` and seed set up for it."""
    cfg = read_config(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gn_det")
    return cfg


def check_machine(cfg: CfgNode) -> None:
    """Raise an `InputError` for a device, weights file or output folder that cannot be used."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("MODEL.DEVICE is cuda, but PyTorch sees no GPU: add MODEL.DEVICE cpu")
    check_weights_file(cfg)
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made: {error.strerror}") from None
    if not os.access(cfg.OUTPUT_DIR, os.W_OK):
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written to")


def check_weights_file(cfg: CfgNode) -> None:
    """Raise an `InputError` for a weights file that does not exist."""
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise InputError(
            f"MODEL.WEIGHTS {weights} does not exist: give the file of a backbone or a detector, "
            'or "" with MODEL.BACKBONE.FREEZE_AT 0 to train from scratch'
        )


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
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    with exit_on_input_error():
        # Before any worker process starts
        args.config_file = find_config(args.config_file)
        args.opts = [*data_opts(args, read_config(args)), *args.opts]
        cfg = read_config(args)
        trainer_class.check_architecture(cfg)
        num_gpus = max(args.num_gpus * args.num_machines, 1)
        if not args.eval_only:
            trainer_class.check_recipe(cfg, num_gpus)
        elif problems := list(check_weights(cfg)):
            raise ConfigError(problems)
        if args.check:
            print(f"{args.config_file}\n\n{describe_recipe(cfg, num_gpus)}")
            print("\n".join(["", *describe_data(cfg)]))
            return
        if args.eval_only and not (cfg.MODEL.WEIGHTS or args.resume):
            raise InputError("--eval-only would evaluate random weights: give MODEL.WEIGHTS")
        trainer_class.check_inputs(cfg, args.eval_only)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, trainer_class),
        )


if __name__ == "__main__":
    run()
