"""`train_net.py --train`: a published recipe is fitted to the dataset, your own is not."""

from argparse import Namespace
from pathlib import Path

import pytest
from conftest import TINY

from gn_det.config import parse_opts
from gn_det.config_file import find_config, read_config
from gn_det.engine.dataset_args import data_opts

PUBLISHED = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn.yaml"
# 12 images with 2 to 6 objects; 1 has none
IMAGES = 11


def opts_for(shapes: Path, folder: Path, *opts: str, config: str = PUBLISHED, gpus: int = 1):
    """The pairs that `--train` adds, by key."""
    words = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder), *opts]
    args = Namespace(
        train=(shapes / "instances_train.json", shapes / "images"),
        val=(shapes / "instances_val.json", shapes / "images"),
        val_fraction=None,
        group_by=None,
        resume=False,
        eval_only=False,
        allow_remote_base=False,
        config_file=find_config(config),
        opts=words,
    )
    return parse_opts(data_opts(args, read_config(config, words), gpus))


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_published_recipe(gpus, shapes, tmp_path):
    """The linear rule from 16 images at 0.02, and 12 * sqrt(2800 / 11) epochs."""
    keys = opts_for(shapes, tmp_path, gpus=gpus)
    batch, epochs = 2 * gpus, round(12 * (2800 / IMAGES) ** 0.5)
    assert int(keys["SOLVER.IMS_PER_BATCH"]) == batch
    assert float(keys["SOLVER.BASE_LR"]) == pytest.approx(0.02 * batch / 16)
    length = int(keys["SOLVER.MAX_ITER"])
    assert length == -(-epochs * IMAGES // batch)
    steps = [round(step / 90000 * length) for step in (60000, 80000)]
    assert keys["SOLVER.STEPS"] == str(tuple(steps))
    assert int(keys["INPUT.MIN_SIZE_TEST"]) < 800
    assert keys["SOLVER.REFERENCE_WORLD_SIZE"] == "0"


def test_pairs_of_the_user(shapes, tmp_path):
    """They are kept, and the rest of the schedule follows them."""
    pairs = ("SOLVER.MAX_ITER", "900", "SOLVER.IMS_PER_BATCH", "4", "INPUT.MIN_SIZE_TEST", "400")
    keys = opts_for(shapes, tmp_path, *pairs)
    assert not {*pairs[::2], "INPUT.MAX_SIZE_TEST"} & {*keys}
    assert keys["SOLVER.STEPS"] == "(600, 800)" and keys["SOLVER.WARMUP_ITERS"] == "90"
    assert float(keys["SOLVER.BASE_LR"]) == pytest.approx(0.005)


def test_a_config_of_ones_own(shapes, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(read_config(PUBLISHED, TINY).dump())
    keys = opts_for(shapes, tmp_path / "out", config=str(own))
    assert not [key for key in keys if key.startswith(("SOLVER.", "INPUT.MIN", "MODEL.ANCHOR"))]
    assert keys["DATASETS.TRAIN"].endswith("train.json',)")
