"""A small comparison of LN with GN, for the tests."""

from pathlib import Path

from conftest import TINY

from gn_det.comparison.compare import parse
from gn_det.comparison.plan import Plan, make_plan

# An untrained model has only low scores
KEYS = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
KEYS += [word for word in TINY if word not in ("SOLVER.IMS_PER_BATCH", "2", "MODEL.WEIGHTS", "")]


def words(shapes: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a comparison of two norms from scratch."""
    train, val = (str(shapes / f"instances_{split}.json") for split in ("train", "val"))
    images = str(shapes / "images")
    return [
        *("--train", train, images, "--val", val, images, "--output-dir", str(output)),
        *("--base", "Shapes/mask_rcnn_R_18_FPN_gn.yaml", "--init", "", "--budget", "6"),
        *("--norms", "LN", "GN", "--seeds", "0", *more, "MODEL.BACKBONE.FREEZE_AT", "0", *KEYS),
    ]


def comparison(shapes: Path, output: Path, *more: str) -> Plan:
    """The plan of that comparison."""
    return make_plan(parse(words(shapes, output, *more)))
