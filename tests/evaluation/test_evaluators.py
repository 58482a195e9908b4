"""Evaluators by the metadata of a dataset, as Detectron2's `train_net.py` chooses them."""

import detectron2.evaluation as d2
import pytest
from conftest import shapes_config
from detectron2.data import DatasetCatalog, MetadataCatalog

from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError

CFG = shapes_config("mask_rcnn_R_18_FPN_gn")
WANTED = {
    "coco": [d2.COCOEvaluator],
    "pascal_voc": [d2.PascalVOCDetectionEvaluator],
    "sem_seg": [d2.SemSegEvaluator],
    "cityscapes_instance": [d2.CityscapesInstanceEvaluator],
    "cityscapes_sem_seg": [d2.CityscapesSemSegEvaluator],
    "coco_panoptic_seg": [d2.SemSegEvaluator, d2.COCOEvaluator, d2.COCOPanopticEvaluator],
}


@pytest.fixture
def register(shapes):
    """Registers a dataset, and removes it after the test."""
    names = []

    def add(kind: str) -> str:
        names.append(f"evaluated as {kind}")
        DatasetCatalog.register(names[-1], list)
        MetadataCatalog.get(names[-1]).set(
            evaluator_type=kind,
            json_file=str(shapes / "instances_val.json"),
            **{"stuff_classes": ["sky"], "ignore_label": 255, "thing_classes": ["nut"]},
            **{"dirname": "none", "split": "val", "year": 2007, "panoptic_root": "none"},
            **{"thing_dataset_id_to_contiguous_id": {}, "stuff_dataset_id_to_contiguous_id": {}},
        )
        return names[-1]

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("kind", WANTED)
def test_evaluators(kind, register):
    built = Trainer.build_evaluator(CFG, register(kind))
    several = built._evaluators if isinstance(built, d2.DatasetEvaluators) else [built]
    assert [type(one) for one in several] == WANTED[kind]


def test_an_unknown_evaluator_is_refused_before_training(register):
    cfg = CFG.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (register("mine"),)
    with pytest.raises(InputError, match="evaluated as mine"):
        Trainer.check_inputs(cfg, eval_only=True)

    class Own(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            return d2.DatasetEvaluators([])

    Own.check_inputs(cfg, eval_only=True)


def test_a_package_that_is_missing(register, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lvis", None)
    with pytest.raises(InputError, match="lvis"):
        Trainer.build_evaluator(CFG, register("lvis"))
