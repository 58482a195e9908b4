"""Compare the config of a resumed training run with the one that it was started with."""

import json
import logging
from pathlib import Path

from detectron2.config import CfgNode

from ..config import flatten
from ..config_file import read_config
from ..errors import InputError

# Keys that may change when a run resumes. Those of the first line are read anew, and the others
# change nothing of what is learned
FREE = (
    *("DATALOADER.", "DATASETS.", "INPUT.", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_"),
    *("PRETRAIN.EPOCHS", "PRETRAIN.STEPS"),
    *("TEST.", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.KEEP_CHECKPOINTS", "SOLVER.SKIP_BAD_BATCHES"),
    *("MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.CHANNELS_LAST", "MODEL.GROUP_NORM.IMPL"),
    *("MODEL.GROUP_NORM.RECOMPUTE", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "OUTPUT_DIR"),
    *("MODEL.ROI_HEADS.NMS_THRESH_TEST", "VIS_PERIOD", "CUDNN_BENCHMARK", "VERSION"),
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
    # A file has lists where the config has tuples
    changed = {
        key: f"{key} {before[key]} became {value}"
        for key, value in now.items()
        if key in before and json.dumps(before[key]) != json.dumps(value)
    }
    if fixed := [text for key, text in changed.items() if not key.startswith(FREE)]:
        more = f" and {len(fixed) - SHOWN} more" * (len(fixed) > SHOWN)
        raise InputError(
            f"{folder} was trained with other settings, which --resume cannot change: "
            f"{', '.join(fixed[:SHOWN])}{more}; use the earlier values, or another OUTPUT_DIR"
        )
    for key, text in changed.items():
        if key != "OUTPUT_DIR":
            logger.warning(f"resuming with other settings: {text}")
