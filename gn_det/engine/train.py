"""Training and evaluation by Detectron2's own trainer, as `tools/train_net.py` runs it."""

import argparse
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
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

from ..config import add_gn_config
from ..data import check_dataset
from ..errors import InputError, exit_on_input_error
from ..model_zoo import get_config_file
from ..modeling.norm import is_group_norm
from ..solver import set_norm_weight_decay
from .run_record import RunRecorder


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with COCO evaluation and the decay rule of norm parameters."""

    def __init__(self, cfg: CfgNode) -> None:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        # As Detectron2 does for its own logger, where `setup` was not called
        if not logging.getLogger("gn_det").isEnabledFor(logging.INFO):
            setup_logger(name="gn_det")
        super().__init__(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        optimizer = super().build_optimizer(cfg, model)
        return set_norm_weight_decay(optimizer, model, cfg.SOLVER.WEIGHT_DECAY_NORM)

    def build_hooks(self) -> list[HookBase]:
        hooks = super().build_hooks()
        if comm.is_main_process():
            # Before the writers, which come last, so that they write what it records
            hooks.insert(-1, RunRecorder(self.cfg))
        return hooks


def read_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config that `args.config_file` and the `KEY VALUE` pairs of `args.opts` describe.

    Raises:
        InputError: for a file that does not exist, and keys or values that do not fit.
    """
    cfg = get_cfg()
    add_gn_config(cfg)
    path = args.config_file
    if not os.path.isfile(path):
        path = get_config_file(path)
    try:
        cfg.merge_from_file(path)
        cfg.merge_from_list(args.opts)
    except (AssertionError, KeyError, ValueError, YAMLError) as error:
        raise InputError(f"config {path} with {args.opts}: {error}") from None
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """The config, with Detectron2's loggers, `config.yaml` and seed set up for it."""
    cfg = read_config(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gn_det")
    return cfg


def check_inputs(cfg: CfgNode, datasets: Iterable[str], annotated: bool = True) -> None:
    """Check what can be checked before anything is written or built.

    Args:
        datasets: names of the data sets that will be used.
        annotated: whether these need annotations.

    Raises:
        InputError: for a device, data set, weights file or output folder that cannot be used.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("MODEL.DEVICE is cuda, but PyTorch sees no GPU: add MODEL.DEVICE cpu")
    for name in datasets:
        # Other architectures count their classes under keys of their own
        is_rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        check_dataset(name, cfg.MODEL.ROI_HEADS.NUM_CLASSES if is_rcnn else None, annotated)
    _check_weights(cfg)
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made: {error.strerror}") from None
    if not os.access(cfg.OUTPUT_DIR, os.W_OK):
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written to")


def _check_weights(cfg: CfgNode) -> None:
    """Refuse a weights file that is missing, or that holds BatchNorm for a GN trunk.

    Detectron2 would load the latter without a word: gamma and beta have the same names, and were
    fitted to other statistics.
    """
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]
    if not weights or "://" in weights:
        return
    if not os.path.isfile(weights):
        raise InputError(f"MODEL.WEIGHTS {weights} does not exist")
    if weights.endswith(".pth") and is_group_norm(cfg.MODEL.RESNETS.NORM):
        content = torch.load(weights, map_location="meta", weights_only=True)
        if any(key.endswith("running_mean") for key in content.get("model", content)):
            raise InputError(
                f"MODEL.WEIGHTS {weights} holds BatchNorm statistics, but MODEL.RESNETS.NORM is "
                f"{cfg.MODEL.RESNETS.NORM}: take weights that were trained with it"
            )


def main(args: argparse.Namespace) -> dict | None:
    """Train, or evaluate with `--eval-only`, in this process; one call a GPU, after `run`'s checks.

    Returns:
        the evaluation's results with `--eval-only`, else what `DefaultTrainer.train` returns.
    """
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(argv: Sequence[str] | None = None) -> None:
    """The whole of `tools/train_net.py`: Detectron2's flags, launcher and `KEY VALUE` overrides."""
    args = default_argument_parser().parse_args(argv)
    with exit_on_input_error():
        # Before any worker process starts
        cfg = read_config(args)
        train = () if args.eval_only else cfg.DATASETS.TRAIN
        check_inputs(cfg, [*train, *cfg.DATASETS.TEST], annotated=not args.eval_only)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


if __name__ == "__main__":
    run()
