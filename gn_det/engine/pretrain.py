"""Pretraining of a backbone as an image classifier: `tools/pretrain_net.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..check.machine import check_machine
from ..checkpoint.save import save_backbone
from ..config import is_clips, is_pretraining
from ..data.image_folder import build_test_loader, build_train_loader, read_folder
from ..errors import InputError
from ..evaluation.classification import AccuracyEvaluator
from ..modeling.weight_norm import folded_weights
from . import train
from .pretrain_schedule import check_folders, resolve_config, with_classes
from .trainer import Trainer

CHECKPOINT = "backbone.pth"
DESCRIPTION = "Pretrain a backbone as an image classifier, on folders with one subfolder per class."
EXAMPLE = "--config-file configs/Shapes/pretrain_R_18_gn.yaml MODEL.DEVICE cpu"


class PretrainTrainer(Trainer):
    """A trainer of image classifiers, which saves the backbone for detectors.

    The schedule, learning rate and number of classes are computed from the `PRETRAIN` keys and the
    training folder. After training, `OUTPUT_DIR/backbone.pth` can be used as `MODEL.WEIGHTS` of a
    detector.

    Args:
        cfg: the config of a classifier; `DATASETS` names folders with one subfolder per class.

    Raises:
        InputError: for a config or folders that cannot be used.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.check_architecture(cfg)
        self.check_data(cfg)
        folder = read_folder(cfg.DATASETS.TRAIN[0], is_clips(cfg))
        super().__init__(resolve_config(cfg, len(folder), len(folder.classes)))

    def train(self) -> Any:
        results = super().train()
        if comm.is_main_process():
            # The checkpointer has unwrapped the model from DistributedDataParallel
            backbone = folded_weights(self.checkpointer.model.backbone)
            path = Path(self.cfg.OUTPUT_DIR) / CHECKPOINT
            try:
                save_backbone(backbone, self.cfg, path)
            except OSError as error:
                raise InputError(f"{path} cannot be written: {error.strerror}") from None
        return results

    @classmethod
    def check_architecture(cls, cfg: CfgNode) -> None:
        if not is_pretraining(cfg):
            name = cfg.MODEL.META_ARCHITECTURE
            raise InputError(f"this config trains a {name}: use tools/train_net.py")

    @classmethod
    def check_data(cls, cfg: CfgNode) -> None:
        check_folders(cfg)

    @classmethod
    def check_inputs(cls, cfg: CfgNode, eval_only: bool) -> None:
        check_folders(cfg, train=not eval_only)
        check_machine(cfg)

    @classmethod
    def evaluate(cls, cfg: CfgNode, resume: bool) -> dict:
        folder = read_folder(cfg.DATASETS.TEST[0], is_clips(cfg))
        return super().evaluate(with_classes(cfg, len(folder.classes)), resume)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> AccuracyEvaluator:
        return AccuracyEvaluator()


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command, with the flags of `train.run`.

    Args:
        argv: the command-line arguments; defaults to `sys.argv[1:]`.
    """
    train.run(argv, PretrainTrainer, DESCRIPTION, EXAMPLE)


if __name__ == "__main__":
    run()
