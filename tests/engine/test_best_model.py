"""`TEST.BEST_METRIC`: the best model is kept, also by a run that was interrupted."""

import math
import shutil

import pytest
import torch
from conftest import SCRATCH, StopAt, shapes_config

from gn_det.check.evaluation import check_evaluation
from gn_det.engine.trainer import Trainer

# AP by the number of iterations that a model was trained for
APS = {2: 3.0, 4: 5.0, 6: math.nan, 8: 4.0}


class Scripted(Trainer):
    """Evaluates by `APS`, without running the model."""

    trained = 0

    def after_step(self):
        type(self).trained = self.iter + 1
        super().after_step()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {"bbox": {"AP": APS[cls.trained]}}


def train(folder, metric="bbox/AP", stop_at=None):
    opts = ("SOLVER.MAX_ITER", 8, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 2)
    opts += ("TEST.EVAL_PERIOD", 2, "TEST.BEST_METRIC", metric, "OUTPUT_DIR", folder)
    torch.manual_seed(0)
    trainer = Scripted(shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, *opts))
    trainer.resume_or_load(resume=True)
    if stop_at:
        trainer.register_hooks([StopAt(stop_at)])
        with pytest.raises(SystemExit):
            trainer.train()
    else:
        trainer.train()
    return folder


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("best"))


def test_the_model_with_the_highest_metric(trained):
    best = weights(trained / "model_best.pth")
    assert same(best, weights(trained / "model_0000003.pth"))
    assert not same(best, weights(trained / "model_final.pth"))
    assert torch.load(trained / "model_best.pth", weights_only=True)["iteration"] == 3
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("stop_at", [3, 4, 5, 7])
def test_a_resumed_run_keeps_the_same_model(stop_at, trained, tmp_path, caplog):
    train(tmp_path / "run", stop_at=stop_at)
    train(tmp_path / "run")
    assert same(weights(tmp_path / "run/model_best.pth"), weights(trained / "model_best.pth"))
    assert "TEST.BEST_METRIC" not in caplog.text


def test_training_does_not_resume_from_it(trained, tmp_path):
    """It has no optimizer state."""
    shutil.copy(trained / "model_best.pth", tmp_path)
    assert not Scripted(
        shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, "OUTPUT_DIR", tmp_path)
    ).checkpointer.has_checkpoint()


def test_a_metric_that_does_not_exist(tmp_path, caplog):
    train(tmp_path, metric="segm/AP")
    assert "TEST.BEST_METRIC segm/AP" in caplog.text and "bbox/AP" in caplog.text
    assert not (tmp_path / "model_best.pth").exists()


@pytest.mark.parametrize(
    "opts",
    [
        ("TEST.BEST_METRIC", "AP", "TEST.EVAL_PERIOD", 5),
        ("TEST.BEST_METRIC", "segm/AP", "TEST.EVAL_PERIOD", 5, "MODEL.MASK_ON", False),
        ("TEST.BEST_METRIC", "segm/AP", "TEST.EVAL_PERIOD", 0),
    ],
)
def test_settings_without_a_best_model(opts):
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, *opts)
    assert [problem.key for problem in check_evaluation(cfg)] == ["TEST.BEST_METRIC"]
