"""Detectron2's default trainer with gn_det's training step, loader, checkpoints and hooks."""

import logging
import os
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim import Optimizer

from ..check import log_warnings, refuse_problems
from ..check.machine import check_machine
from ..check.proposals import check_proposals
from ..checkpoint.checkpointer import StrictCheckpointer
from ..config import is_pretraining
from ..data.coco import remove_converted_annotations
from ..data.loader import TrainLoader, build_train_loader, is_dead_loader
from ..data.registered import check_datasets, log_findings
from ..data.worker_limits import sharing_workers
from ..errors import InputError
from ..evaluation.evaluators import build_evaluator, evaluators_of
from ..evaluation.metrics_file import drop_metrics_from
from ..solver import build_optimizer
from .accumulate import accumulate_gradients
from .distributed import distribute
from .hook_order import order_hooks
from .resume import check_settings, settings_of
from .trackers import build_trackers
from .train_step import BadBatchError, TrainingEnd, TrainingStep, without_traceback


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with COCO evaluation and separate weight decay of norms.

    Resuming is exact: in float32 on a CPU, with the same number of processes, the result equals
    that of an uninterrupted run bit by bit.

    Args:
        cfg: a config with gn_det's keys.

    Raises:
        ConfigError: an `InputError`, if `gn_det.check_config` refuses the config.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.check_architecture(cfg)
        self.check_recipe(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        for name in ("detectron2", "gn_det"):  # if `default_setup` was not called
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name)
        if comm.is_main_process():
            log_warnings(cfg)
            self.check_data(cfg)
        # DefaultTrainer.__init__ would create its own training step and checkpointer
        TrainerBase.__init__(self)
        self._settings = settings_of(cfg)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        keys = cfg.SOLVER
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        amp = getattr(torch, keys.AMP.DTYPE) if keys.AMP.ENABLED else None
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        model = distribute(model)
        self._trainer = TrainingStep(model, loader, optimizer, amp, keys.SKIP_BAD_BATCHES, seed)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = StrictCheckpointer(
            model, cfg.OUTPUT_DIR, keep=keys.KEEP_CHECKPOINTS, trainer=weakref.proxy(self)
        )
        self.start_iter, self.max_iter = 0, keys.MAX_ITER
        self._writers: list[EventWriter] = []
        self.register_hooks(self.build_hooks())

    @classmethod
    def check_architecture(cls, cfg: CfgNode) -> None:
        """Refuse a config for another trainer.

        Raises:
            InputError: if the config is for another tool, which the message names.
        """
        if is_pretraining(cfg):
            raise InputError("this config pretrains a classifier: use tools/pretrain_net.py")

    @classmethod
    def check_recipe(cls, cfg: CfgNode, num_gpus: int | None = None) -> None:
        """Refuse a config that would fail or train wrongly; `__init__` logs the warnings.

        Args:
            cfg: as in `gn_det.check_config`.
            num_gpus: as in `gn_det.check_config`.

        Raises:
            ConfigError: if there is any problem.
        """
        refuse_problems(cfg, num_gpus)

    @classmethod
    def check_data(cls, cfg: CfgNode) -> None:
        """Check the datasets, and log what was found; an `InputError` if one cannot be used."""
        log_findings(cfg)

    @classmethod
    def check_inputs(cls, cfg: CfgNode, eval_only: bool) -> None:
        """Check files and the device before training or evaluation starts.

        Args:
            cfg: the config.
            eval_only: whether only the test datasets are used.

        Raises:
            InputError: for a device, dataset, evaluator, proposal file, weights file or output
                folder that cannot be used.
        """
        check_datasets(cfg, train=not eval_only)
        check_proposals(cfg, eval_only)
        check_machine(cfg)
        own = cls.__mro__[: cls.__mro__.index(Trainer)]
        if not any("build_evaluator" in vars(subclass) for subclass in own):
            for name in cfg.DATASETS.TEST:
                evaluators_of(name)
        if comm.is_main_process():
            remove_converted_annotations(cfg)

    @classmethod
    def evaluate(cls, cfg: CfgNode, resume: bool) -> dict:
        """Evaluate the model in `MODEL.WEIGHTS`, or the last checkpoint if `resume` is set.

        Returns:
            results by dataset, task and metric, as `DefaultTrainer.test` does.
        """
        model = cls.build_model(cfg)
        StrictCheckpointer(model, cfg.OUTPUT_DIR, complete=True).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=resume
        )
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(cls.test_with_augmentation(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate with test-time augmentation, as `TEST.AUG` says.

        Returns:
            results as `DefaultTrainer.test` does, with "_TTA" added to their names.
        """
        evaluators = [
            cls.build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference_TTA"))
            for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": found for name, found in results.items()}

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build the training loader; subclasses can call `build_train_loader(cfg, mapper)`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = sharing_workers(cfg.DATALOADER.NUM_WORKERS)
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.SOLVER.ACCUMULATE_ITERS > 1:
            accumulate_gradients(model, cfg.SOLVER.ACCUMULATE_ITERS)
        return model

    def build_writers(self) -> list[EventWriter]:
        self._writers = [*super().build_writers(), *build_trackers(self.cfg)]
        return self._writers

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks and gn_det's, in the order of `order_hooks`."""
        test = partial(self.test_with_augmentation, self.cfg, self.model)
        return order_hooks(super().build_hooks(), self.cfg, self.checkpointer, self._writers, test)

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the newest intact checkpoint if `resume` is set and there is one.

        Otherwise load `MODEL.WEIGHTS`.
        """
        main = comm.is_main_process()
        # On a network file system, processes could find different checkpoints
        paths = comm.all_gather(self.checkpointer.get_checkpoint_file() if main and resume else "")
        if paths[0]:
            self.checkpointer.load(paths[0])
            self.start_iter, self._trainer.seed = comm.all_gather(
                (self.iter + 1, self._trainer.seed)
            )[0]
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
        if main and resume:
            drop_metrics_from(self.cfg.OUTPUT_DIR, self.start_iter)
        if self.start_iter >= self.max_iter:
            logging.getLogger(__name__).warning(
                f"{paths[0]} has finished all {self.max_iter:,} iterations, so nothing is trained: "
                "raise SOLVER.MAX_ITER to train for longer"
            )

    def train(self) -> Any:
        """Train until `SOLVER.MAX_ITER`.

        Returns:
            the results of the last evaluation, as `DefaultTrainer.train` does.

        Raises:
            InputError: for a bad batch, for a full or unavailable disk, and if a worker process of
                the data loader is killed. Checkpoints stay intact.
            SystemExit: on SIGINT or SIGTERM, after a checkpoint has been saved.
        """
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.start_at(self._trainer.seed, self.start_iter)
        elif self.start_iter:
            logging.getLogger(__name__).warning(
                "The order of images is not restored: build_train_loader returns no TrainLoader"
            )
        with without_traceback():
            try:
                return super().train()
            except TrainingEnd:
                return self._last_results()
            except OSError as error:
                reason = f"{error.filename or self.cfg.OUTPUT_DIR}: {error.strerror or error}"
            except RuntimeError as error:
                if not is_dead_loader(error):
                    raise
                reason = (
                    "a worker process of the data loader was killed, perhaps because memory or "
                    "/dev/shm was full: use a smaller DATALOADER.NUM_WORKERS"
                )
            finally:
                if isinstance(self.data_loader, TrainLoader):
                    self._trainer._data_loader_iter.close()  # ends the worker processes
        raise InputError(f"{reason}. {self._resume_hint()}")

    def _last_results(self) -> Any:
        """The results of the last evaluation, verified as after `SOLVER.MAX_ITER` iterations."""
        results = getattr(self, "_last_eval_results", None)
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, results or {})
        return results

    def run_step(self) -> None:
        try:
            super().run_step()
        except BadBatchError as error:
            hint = "--skip-bad-batches N skips bad batches; SOLVER.BASE_LR may be too high"
            raise BadBatchError(f"{error}. {self._resume_hint()}; {hint}") from None

    def _resume_hint(self) -> str:
        path = self.checkpointer.get_checkpoint_file()
        return f"--resume resumes from {path}" if path else "There is no checkpoint yet"

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 0.6 omits its inner trainer, and the optimizer with it
        own = {"_trainer": self._trainer.state_dict(), "settings": self._settings}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = self.checkpointer.get_checkpoint_file()
        check_settings(state_dict.get("settings", {}), self._settings, path)
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            for group in self.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
            logging.getLogger(__name__).warning(
                "The checkpoint has no optimizer state, as is usual with Detectron2 0.6"
            )
