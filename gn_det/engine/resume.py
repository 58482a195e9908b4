"""Compare the config of a resumed training run with the one that it was started with."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config import flatten
from ..config_file import read_config
from ..data.registered import digests_of
from ..errors import InputError

# Keys that may change when a run resumes. Those of the first line are read anew, and the others
# change nothing of what is learned
FREE = (
    *("DATALOADER.", "DATASETS.", "INPUT.", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_"),
    *("PRETRAIN.EPOCHS", "PRETRAIN.STEPS", "SOLVER.PATIENCE"),
    *("TEST.", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.KEEP_CHECKPOINTS", "SOLVER.SKIP_BAD_BATCHES"),
    *("MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.CHANNELS_LAST", "MODEL.GROUP_NORM.IMPL"),
    *("MODEL.GROUP_NORM.RECOMPUTE", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "OUTPUT_DIR"),
    *("MODEL.ROI_HEADS.NMS_THRESH_TEST", "VIS_PERIOD", "TRACKERS", "CUDNN_BENCHMARK", "VERSION"),
)
# Number of keys that a message names
SHOWN = 5


def check_resumed_config(cfg: CfgNode) -> None:
    """Refuse to resume with keys that a checkpoint has decided already.

    The optimizer's state holds the learning rates and the momentum, and the seed the order of the
    images, so another value would be ignored, or would fit no checkpoint. Changes of other keys
    are logged.

    Args:
        cfg: the config to resume with; without a checkpoint in `OUTPUT_DIR`, nothing is checked.

    Raises:
        InputError: naming the keys.
    """
    folder = Path(cfg.OUTPUT_DIR)
    written = folder / "config.yaml"
    if not any(folder.glob("model_*.pth")) or not written.is_file():
        return
    logger = logging.getLogger(__name__)
    try:
        before, now = flatten(read_config(str(written))), flatten(cfg)
    except InputError as error:
        logger.warning(f"the settings of the earlier run cannot be compared: {error}")
        return
    changed = changes_of(before, now)
    refuse_fixed(changed, str(folder))
    for key, text in changed.items():
        if key != "OUTPUT_DIR":
            logger.warning(f"resuming with other settings: {text}")


def changes_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{key: description of its change} for all keys that both have with different values."""
    # A file has lists where the config has tuples
    return {
        key: f"{key} {before[key]} became {value}"
        for key, value in now.items()
        if key in before and json.dumps(before[key]) != json.dumps(value)
    }


def refuse_fixed(changed: Mapping[str, str], trained: str) -> None:
    """Raise an `InputError` if a changed key is not one of `FREE`.

    Args:
        changed: as `changes_of` returns it.
        trained: the folder or file whose settings are compared, for the message.
    """
    if fixed := [text for key, text in changed.items() if not key.startswith(FREE)]:
        more = f" and {len(fixed) - SHOWN} more" * (len(fixed) > SHOWN)
        raise InputError(
            f"{trained} was trained with other settings, which --resume cannot change: "
            f"{', '.join(fixed[:SHOWN])}{more}; use the earlier values, or another OUTPUT_DIR"
        )


def settings_of(cfg: CfgNode) -> dict[str, str]:
    """What a checkpoint records of its run: all keys that are not `FREE`, and the training data.

    Without this record, a folder that was used again and interrupted before its first checkpoint
    would be resumed from a checkpoint of the run before.
    """
    fixed = {key: value for key, value in flatten(cfg).items() if not key.startswith(FREE)}
    data = {f"dataset {name}": digest for name, digest in digests_of(cfg.DATASETS.TRAIN).items()}
    return {key: json.dumps(value) for key, value in {**fixed, **data}.items()}


def check_settings(recorded: Mapping[str, str], current: Mapping[str, str], trained: str) -> None:
    """Refuse a checkpoint of a run with other settings or other data.

    Args:
        recorded: in the checkpoint, by `settings_of`; empty for a checkpoint of Detectron2.
        current: those of the run that resumes.
        trained: path of the checkpoint, for the message.

    Raises:
        InputError: naming the keys or datasets.
    """
    before, now = (
        {key: json.loads(text) for key, text in settings.items()}
        for settings in (recorded, current)
    )
    refuse_fixed(changes_of(before, now), trained)
