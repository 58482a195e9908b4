"""Writers that send metrics to an experiment tracker: Weights & Biases or MLflow."""

import importlib
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..config import flatten
from ..errors import InputError

# Iterations over which noisy metrics are smoothed, as in Detectron2's writers
WINDOW = 20
PARAMETER = 500  # characters of a parameter that MLflow accepts


class Tracker(EventWriter):
    """Sends the metrics that are new since the last call."""

    def __init__(self) -> None:
        self._last = -1

    def write(self) -> None:
        storage = get_event_storage()
        latest = storage.latest_with_smoothing_hint(WINDOW)
        new = {name: value for name, (value, step) in latest.items() if step > self._last}
        self._last = max([self._last, *(step for _, step in latest.values())])
        if new:
            self.send(new, storage.iter)

    def send(self, metrics: dict[str, float], iteration: int) -> None:
        """Send the metrics of an iteration."""
        raise NotImplementedError


class WandbWriter(Tracker):
    """Logs to the Weights & Biases run of the output folder, which a resumed training continues.

    Args:
        cfg: the config of the training run.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        wandb = _import("wandb")
        folder = Path(cfg.OUTPUT_DIR)
        self._run = wandb.init(
            project="gn_det",
            name=folder.name,
            dir=str(folder),
            config=flatten(cfg),
            id=sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
        )

    def send(self, metrics: dict[str, float], iteration: int) -> None:
        self._run.log(metrics, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MLflowWriter(Tracker):
    """Logs to an MLflow run.

    Args:
        cfg: the config of the training run.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self._mlflow: Any = _import("mlflow")
        self._mlflow.start_run(run_name=Path(cfg.OUTPUT_DIR).name)
        self._mlflow.log_params({k: str(v)[:PARAMETER] for k, v in flatten(cfg).items()})

    def send(self, metrics: dict[str, float], iteration: int) -> None:
        self._mlflow.log_metrics(metrics, step=iteration)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS = {"wandb": WandbWriter, "mlflow": MLflowWriter}


def build_trackers(cfg: CfgNode) -> list[EventWriter]:
    """The writers that `TRACKERS` names.

    Raises:
        InputError: if a name is unknown, a package is not installed, or a tracker cannot start.
    """
    writers: list[EventWriter] = []
    for name in cfg.TRACKERS:
        if name not in TRACKERS:
            fix = f"use some of {', '.join(TRACKERS)}"
            raise InputError(f"TRACKERS has {name!r}", key="TRACKERS", fix=fix)
        try:
            writers.append(TRACKERS[name](cfg))
        except InputError:
            raise
        except Exception as error:  # each tracker has errors of its own, such as a missing login
            reason = str(error).partition("\n")[0] or type(error).__name__
            fix = "set it up, or remove it"
            raise InputError(f"TRACKERS {name}: {reason}", key="TRACKERS", fix=fix) from error
    return writers


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        fix = f'run pip install "gn_det[{name}]", or remove it'
        raise InputError(f"TRACKERS {name}: {error}", key="TRACKERS", fix=fix) from None
