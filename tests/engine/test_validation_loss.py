"""`TEST.VALIDATION_LOSS`: the losses on the validation set, without an effect on the training."""

from statistics import mean

import pytest
import torch
from conftest import SCRATCH, shapes_config
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from gn_det.check.evaluation import check_evaluation
from gn_det.engine.trainer import Trainer
from gn_det.evaluation.metrics_file import metrics_of

# All anchors and proposals count, so that no random sample decides
ALL = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 60000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 60000)


def train(folder, *opts):
    words = (*SCRATCH, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", "SEED", 1, "OUTPUT_DIR", folder)
    words += ("TEST.EVAL_PERIOD", 2, *ALL, *opts)
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *words)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return cfg, trainer.model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss")
    return folder, *train(folder, "TEST.VALIDATION_LOSS", True)


def losses_of(cfg, model) -> dict[str, float]:
    """Detectron2's losses, image by image."""
    resize = ResizeShortestEdge([64, 64], cfg.INPUT.MAX_SIZE_TEST)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[resize])
    model.train()
    with EventStorage(), torch.no_grad():
        records = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
        each = [model([mapper(record)]) for record in records]
    return {name: mean(float(losses[name]) for losses in each) for name in each[0]}


def test_losses_of_the_last_evaluation(trained):
    folder, cfg, model = trained
    lines = [line for line in metrics_of(folder) if "validation_total_loss" in line]
    assert [line["iteration"] for line in lines] == [1, 3]
    expected = losses_of(cfg, model)
    for name, loss in expected.items():
        assert_close(lines[-1][f"validation_{name}"], loss, rtol=1e-4, atol=1e-6)
    total = sum(expected.values())
    assert_close(lines[-1]["validation_total_loss"], total, rtol=1e-4, atol=1e-6)


def test_training_is_the_same_without_it(trained, tmp_path):
    _, _, model = trained
    _, other = train(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_with_accumulation_and_batch_norm(tmp_path):
    """The passes of a batch change nothing, and BatchNorm keeps its running statistics."""
    opts = ("TEST.VALIDATION_LOSS", True, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE_ITERS", 2)
    opts += ("MODEL.RESNETS.NORM", "BN")
    _, model = train(tmp_path / "a", *opts)
    _, other = train(tmp_path / "b", *opts, "TEST.VALIDATION_LOSS", False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    lines = [line for line in metrics_of(tmp_path / "a") if "validation_total_loss" in line]
    assert lines[-1]["validation_total_loss"] > 0


def test_other_architectures():
    opts = ("TEST.VALIDATION_LOSS", True, "MODEL.META_ARCHITECTURE", "RetinaNet")
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, *opts)
    assert [problem.key for problem in check_evaluation(cfg)] == ["TEST.VALIDATION_LOSS"]
