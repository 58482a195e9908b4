"""`SOLVER.PATIENCE`: a run ends when a metric has stopped improving, also if it was resumed."""

import logging
import math

import pytest
import torch
from conftest import SCRATCH, StopAt, shapes_config

from gn_det.check.evaluation import check_evaluation
from gn_det.engine.run_record import RECORD
from gn_det.engine.trainer import Trainer
from gn_det.evaluation.metrics_file import metrics_of

# AP by the number of iterations that a model was trained for: no better one after 4
APS = {2: 3.0, 4: 5.0, 6: 5.0, 8: math.nan, 10: 9.0, 12: 1.0}


class Scripted(Trainer):
    """Evaluates by `APS`, without running the model."""

    trained = 0
    evaluated: tuple[int, ...] = ()

    def after_step(self):
        type(self).trained = self.iter + 1
        super().after_step()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.evaluated += (cls.trained,)
        return {"bbox": {"AP": APS[cls.trained]}}


def train(folder, patience=2, stop_at=None):
    opts = ("SOLVER.MAX_ITER", 12, "SOLVER.STEPS", "(9,)", "SOLVER.CHECKPOINT_PERIOD", 2)
    opts += ("TEST.EVAL_PERIOD", 2, "TEST.BEST_METRIC", "bbox/AP", "OUTPUT_DIR", folder)
    torch.manual_seed(0)
    Scripted.evaluated = ()
    words = (*SCRATCH, *opts, "SOLVER.PATIENCE", patience, "SEED", 1)
    trainer = Scripted(shapes_config("mask_rcnn_R_18_FPN_gn", *words))
    trainer.resume_or_load(resume=True)
    if stop_at:
        trainer.register_hooks([StopAt(stop_at)])
        with pytest.raises(SystemExit):
            trainer.train()
        return None
    return trainer.train()


def final(folder) -> dict:
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    results = train(folder)
    assert math.isnan(results["bbox"]["AP"])
    assert Scripted.evaluated == (2, 4, 6, 8, 8)
    return folder


def test_the_run_is_complete(ended):
    """Like one that has reached `SOLVER.MAX_ITER`."""
    assert final(ended)["iteration"] == 7
    assert (ended / RECORD).is_file()
    assert (ended / "last_checkpoint").read_text() == "model_final.pth"
    assert [line["iteration"] for line in metrics_of(ended) if "bbox/AP" in line][-2:] == [7, 8]
    assert torch.load(ended / "model_best.pth", weights_only=True)["iteration"] == 3


def test_no_traceback(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tmp_path)
    assert "SOLVER.PATIENCE" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_a_resumed_run_ends_at_the_same_iteration(stop_at, ended, tmp_path):
    train(tmp_path, stop_at=stop_at)
    train(tmp_path)
    one, two = final(ended), final(tmp_path)
    assert one["iteration"] == two["iteration"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name


def test_resuming_an_ended_run(tmp_path):
    """It trains no further, unless the patience is raised."""
    train(tmp_path)
    before = final(tmp_path)
    train(tmp_path)
    assert final(tmp_path)["iteration"] == before["iteration"] == 7
    train(tmp_path, patience=3)
    assert final(tmp_path)["iteration"] == 11


def test_patience_needs_a_metric():
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, "SOLVER.PATIENCE", 2)
    assert [problem.key for problem in check_evaluation(cfg)] == ["SOLVER.PATIENCE"]
