"""The evaluator of a dataset, chosen by its metadata as in Detectron2's `train_net.py`."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..errors import InputError

Build = Callable[[str, str, CfgNode], DatasetEvaluator]


def _coco(name: str, folder: str, cfg: CfgNode) -> DatasetEvaluator:
    return COCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)


def _semantic(name: str, folder: str, cfg: CfgNode) -> DatasetEvaluator:
    return SemSegEvaluator(name, output_dir=folder)


PANOPTIC: list[Build] = [_semantic, _coco, lambda n, f, _: COCOPanopticEvaluator(n, f)]
# `evaluator_type` of the metadata -> evaluators
EVALUATORS: dict[str, list[Build]] = {
    "coco": [_coco],
    "lvis": [lambda name, folder, _: LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": [lambda name, *_: PascalVOCDetectionEvaluator(name)],
    "sem_seg": [_semantic],
    "coco_panoptic_seg": PANOPTIC,
    "ade20k_panoptic_seg": PANOPTIC,
    "cityscapes_instance": [lambda name, *_: CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": [lambda name, *_: CityscapesSemSegEvaluator(name)],
}


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    """Build the evaluator of a dataset.

    Args:
        cfg: a config.
        dataset_name: a registered dataset; without an `evaluator_type` it is evaluated as COCO's.
        folder: for predictions.

    Raises:
        InputError: if Detectron2 has no evaluator of this type, or it needs a package that is not
            installed.
    """
    try:
        built = [build(dataset_name, folder, cfg) for build in evaluators_of(dataset_name)]
    except ImportError as error:
        raise InputError(
            f"the evaluator of dataset {dataset_name} needs a package: {error}; install it"
        ) from None
    return built[0] if len(built) == 1 else DatasetEvaluators(built)


def evaluators_of(dataset_name: str) -> list[Build]:
    """The functions that build the evaluators of a dataset; see `build_evaluator`."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in EVALUATORS:
        raise InputError(
            f"dataset {dataset_name} has evaluator_type {kind!r} in its metadata, but must have "
            f"one of {', '.join(EVALUATORS)}; or override build_evaluator in a subclass of Trainer"
        )
    return EVALUATORS[kind]
