"""Detectron2's default trainer, with gn_det's step, loader, checkpoints and hooks."""

import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..check import check_config
from ..check.machine import check_machine
from ..check.proposals import check_proposals
from ..checkpoint.checkpointer import StrictCheckpointer
from ..config import is_pretraining
from ..data import check_dataset
from ..data.loader import TrainLoader, build_train_loader
from ..errors import InputError
from ..solver import build_optimizer
from .accumulate import accumulate_gradients
from .hooks import Evaluation, MemoryRecorder, RunRecorder, StopOnSignal
from .metrics_file import cut_metrics
from .train_step import BadBatchError, TrainingStep


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with COCO evaluation and the decay rule of norm parameters.

    A training that was stopped, however, goes on as if it had not been: in float32 on a CPU it
    ends with the same bits, given as many processes.

    Raises:
        ConfigError: an `InputError`, for a config that `gn_det.check_config` refuses.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.check_architecture(cfg)
        self.check_recipe(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        for name in ("detectron2", "gn_det"):  # as Detectron2 does, where `setup` was not called
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name)
        # What DefaultTrainer does here leaves no choice of step and checkpointer
        TrainerBase.__init__(self)
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
            InputError: for a device, data set, proposal file, weights file or output folder that
                cannot be used.
        """
        for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
            # Other architectures count their classes under keys of their own
            is_rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
            classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES if is_rcnn else None
            check_dataset(name, classes, annotated=not eval_only)
        check_proposals(cfg, eval_only)
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
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """What `cfg` asks for; a subclass calls `build_train_loader(cfg, its_mapper)`."""
        return build_train_loader(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.SOLVER.ACCUMULATE_ITERS > 1:
            accumulate_gradients(model, cfg.SOLVER.ACCUMULATE_ITERS)
        return model

    def build_writers(self) -> list[EventWriter]:
        self._writers = super().build_writers()
        return self._writers

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, so that a checkpoint holds no more than has been written of what it cost.

        First what belongs to the iteration, then evaluation, writers and the checkpoint.
        """
        built = super().build_hooks()
        period, folder = self.cfg.TEST.EVAL_PERIOD, self.cfg.OUTPUT_DIR
        metrics = [writer for writer in self._writers if isinstance(writer, JSONWriter)]
        saving = [hook for hook in built if isinstance(hook, hooks.PeriodicCheckpointer)]
        order: list[HookBase] = []
        for hook in built:
            if isinstance(hook, hooks.EvalHook):
                order.append(MemoryRecorder(self.cfg.MODEL.DEVICE))
                order.append(StopOnSignal(self.checkpointer, metrics))
                order.append(Evaluation(hook, period, folder, metrics))
                # After the last evaluation, and before the writers
                order += [RunRecorder(self.cfg)] if comm.is_main_process() else []
            elif hook not in saving:
                order.append(hook)
        return order + saving

    def resume_or_load(self, resume: bool = True) -> None:
        """Load `MODEL.WEIGHTS`, or with `resume` all of the newest whole checkpoint, if any."""
        main = comm.is_main_process()
        # Each process might find another one, by a disk that is shared over a network
        found = comm.all_gather(self.checkpointer.get_checkpoint_file() if main and resume else "")
        if found[0]:
            self.checkpointer.load(found[0])
            self.start_iter, self._trainer.seed = comm.all_gather(
                (self.iter + 1, self._trainer.seed)
            )[0]
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
        if main and resume:
            cut_metrics(self.cfg.OUTPUT_DIR, self.start_iter)

    def train(self) -> Any:
        """Train to the end; what stops it on its way leaves the checkpoints as they are.

        Raises:
            InputError: for a bad batch, and for a disk that is full or gone.
            SystemExit: on SIGINT or SIGTERM, after a checkpoint.
        """
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.start_at(self._trainer.seed, self.start_iter)
        elif self.start_iter:
            logging.getLogger(__name__).warning(
                "Going on with another order of pictures: build_train_loader gives no TrainLoader"
            )
        with without_traceback():
            try:
                return super().train()
            except OSError as error:
                what = f"{error.filename or self.cfg.OUTPUT_DIR}: {error.strerror or error}"
            except RuntimeError as error:
                if not is_dead_loader(error):
                    raise
                what = (
                    "a process that loads pictures was killed, perhaps since memory ran out, which "
                    "a smaller DATALOADER.NUM_WORKERS needs less of"
                )
            finally:
                if isinstance(self.data_loader, TrainLoader):
                    self._trainer._data_loader_iter.close()  # and the processes that load
        raise InputError(f"{what}. {self._how_to_go_on()}")

    def run_step(self) -> None:
        try:
            super().run_step()
        except BadBatchError as error:
            pass_over = "--skip-bad-batches N passes over bad ones, SOLVER.BASE_LR may be too high"
            raise BadBatchError(f"{error}. {self._how_to_go_on()}; {pass_over}") from None

    def _how_to_go_on(self) -> str:
        found = self.checkpointer.get_checkpoint_file()
        return f"--resume goes on from {found}" if found else "There is no checkpoint yet"

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 0.6 leaves its inner trainer out, and with it the optimizer
        return super().state_dict() | {"_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            for group in self.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
            logging.getLogger(__name__).warning(
                "The checkpoint has no optimizer in it, as Detectron2 0.6 writes them"
            )


def distribute(model: nn.Module) -> nn.Module:
    """The model, in `DistributedDataParallel` where several processes train it."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


@contextmanager
def without_traceback() -> Iterator[None]:
    """Keep Detectron2's loop from logging a traceback for what ends in one sentence."""

    def wanted(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        told = isinstance(error, InputError | OSError) or is_dead_loader(error)
        return not told

    logger = logging.getLogger("detectron2.engine.train_loop")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def is_dead_loader(error: BaseException | None) -> bool:
    """Whether PyTorch says by an error that a loading process is gone."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
