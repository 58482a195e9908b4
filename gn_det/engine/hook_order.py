"""The hooks of a training run, in their order."""

from collections.abc import Callable, Sequence

from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter

from .best_model import BestModel
from .drawn_predictions import DrawnPredictions
from .early_stopping import EarlyStopping
from .hooks import Evaluation, FreezeObjects, MemoryRecorder, RunRecorder, StopOnSignal
from .validation_loss import ValidationLoss


def order_hooks(
    built: Sequence[HookBase],
    cfg: CfgNode,
    checkpointer: Checkpointer,
    writers: Sequence[EventWriter],
    test_with_augmentation: Callable[[], dict],
) -> list[HookBase]:
    """Add gn_det's hooks to Detectron2's, with the checkpoint after all others.

    The order is: hooks that belong to the iteration, evaluation, writers, checkpoint. So the
    metrics of an iteration are on disk before its checkpoint is.

    Args:
        built: the hooks of `DefaultTrainer`.
        cfg: the config of the run.
        checkpointer: saves its checkpoints.
        writers: of its metrics.
        test_with_augmentation: evaluates as `TEST.AUG` says.
    """
    period, folder = cfg.TEST.EVAL_PERIOD, cfg.OUTPUT_DIR
    metrics = [writer for writer in writers if isinstance(writer, JSONWriter)]
    saving = [hook for hook in built if isinstance(hook, hooks.PeriodicCheckpointer)]
    order: list[HookBase] = [FreezeObjects()]
    for hook in built:
        if isinstance(hook, hooks.EvalHook):
            order.append(MemoryRecorder(cfg.MODEL.DEVICE))
            order.append(StopOnSignal(checkpointer, metrics))
            if cfg.TEST.VALIDATION_LOSS:
                order.append(ValidationLoss(cfg))
            order.append(Evaluation(hook, period, folder, metrics))
            if cfg.TEST.AUG.ENABLED:
                last = hooks.EvalHook(0, test_with_augmentation)
                order.append(Evaluation(last, 0, folder, metrics))
            if cfg.TEST.BEST_METRIC and comm.is_main_process():
                order.append(BestModel(checkpointer, cfg.TEST.BEST_METRIC))
            if cfg.SOLVER.PATIENCE > 0:
                keys = cfg.TEST.BEST_METRIC, cfg.SOLVER.PATIENCE
                order.append(EarlyStopping(folder, *keys, saving))
            if cfg.TEST.DRAWN_IMAGES > 0 and comm.is_main_process():
                order.append(DrawnPredictions(cfg))
            # After the final evaluation, and before the writers
            order += [RunRecorder(cfg)] if comm.is_main_process() else []
        elif hook not in saving:
            order.append(hook)
    return order + saving
