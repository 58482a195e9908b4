"""`TRACKERS`: metrics for Weights & Biases and MLflow, which stand-ins replace here."""

import sys
from types import SimpleNamespace

import pytest
from conftest import shapes_config
from detectron2.utils.events import EventStorage

from gn_det.engine.trackers import build_trackers
from gn_det.errors import InputError


@pytest.fixture
def sent(monkeypatch) -> list:
    """What the stand-ins were called with."""
    calls = []

    def record(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs))

    run = SimpleNamespace(log=record("log"), finish=record("finish"))
    wandb = SimpleNamespace(init=lambda **kwargs: record("init")(**kwargs) or run)
    names = ("start_run", "log_params", "log_metrics", "end_run")
    mlflow = SimpleNamespace(**{name: record(name) for name in names})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def config(tmp_path, *names):
    return shapes_config("mask_rcnn_R_18_FPN_gn", "OUTPUT_DIR", tmp_path, "TRACKERS", names)


def log_two_iterations(writers) -> None:
    with EventStorage(0) as storage:
        for loss in (3.0, 1.0):
            storage.put_scalar("total_loss", loss, smoothing_hint=False)
            for writer in writers:
                writer.write()
                writer.write()  # nothing is new
            storage.step()
        for writer in writers:
            writer.close()


def test_weights_and_biases(tmp_path, sent):
    log_two_iterations(build_trackers(config(tmp_path / "gn", "wandb")))
    (_, _, started), *others = sent
    assert started["name"] == "gn" and started["config"]["MODEL.RESNETS.NORM"] == "GN"
    assert others == [
        ("log", ({"total_loss": 3.0},), {"step": 0}),
        ("log", ({"total_loss": 1.0},), {"step": 1}),
        ("finish", (), {}),
    ]
    ids = {started["id"]}
    for name in ("gn", "other"):
        build_trackers(config(tmp_path / name, "wandb"))
        ids.add(sent[-1][2]["id"])
    assert len(ids) == 2, "a resumed training has the same id, another one has its own"


def test_mlflow(tmp_path, sent):
    log_two_iterations(build_trackers(config(tmp_path / "gn", "mlflow")))
    (_, _, started), (_, (parameters,), _), *others = sent
    assert started == {"run_name": "gn"} and parameters["MODEL.RESNETS.NORM"] == "GN"
    assert max(map(len, parameters.values())) <= 500, "MLflow's limit"
    assert others == [
        ("log_metrics", ({"total_loss": 3.0},), {"step": 0}),
        ("log_metrics", ({"total_loss": 1.0},), {"step": 1}),
        ("end_run", (), {}),
    ]


def test_none_by_default(tmp_path, sent):
    assert build_trackers(config(tmp_path)) == [] and sent == []


def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="TRACKERS"):
        build_trackers(config(tmp_path, "tensorflow"))

    def fail(**kwargs):
        raise ConnectionError("no login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail))
    with pytest.raises(InputError, match=r"TRACKERS wandb: no login"):
        build_trackers(config(tmp_path, "wandb"))
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"TRACKERS.*pip install"):
        build_trackers(config(tmp_path, "mlflow"))
