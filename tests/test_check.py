"""`gn_det.check_config` finds every known mistake, and accepts correct configs."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from detectron2.config import CfgNode
from detectron2.data.datasets import register_coco_instances
from torch import nn

import gn_det
from gn_det.check.schedule import unscaled_batch
from gn_det.config_file import read_config
from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError

LEAVES = sorted(
    str(path.relative_to(ROOT / "configs"))
    for path in (ROOT / "configs").glob("*/*.yaml")
    if not path.name.startswith("Base-")
)
FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn"
FROZEN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_2x_gn"
SCRATCH = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn"
SYNC = "Detectron1-Comparisons/scratch_mask_rcnn_R_50_FPN_noaug_3x_syncbn"
UNFROZEN = "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_2x_bn"
PUBLISHED = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
STOCK = {
    "BACKBONE": "build_resnet_fpn_backbone",
    "ROI_BOX_HEAD": "FastRCNNConvFCHead",
    "ROI_MASK_HEAD": "MaskRCNNConvUpsampleHead",
}


def config(name: str, *opts: object) -> CfgNode:
    return read_config(f"{name}.yaml", list(map(str, opts)))


def problems(cfg: CfgNode, num_gpus: int = 8) -> dict[str, str]:
    """The messages of all problems in a config, by key."""
    try:
        gn_det.check_config(cfg, num_gpus)
    except InputError as error:
        messages = {problem.key: str(problem) for problem in error.problems}
        assert all(message in str(error) for message in messages.values())
        for problem in error.problems:
            assert problem.reason and problem.fix and str(problem).startswith(problem.key)
        return messages
    return {}


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("num_gpus", [1, 8])
def test_every_shipped_config_passes(name, num_gpus):
    assert problems(config(name.removesuffix(".yaml")), num_gpus) == {}


# Mistakes: (config, overrides, key of the problem, text in its message)
MISTAKES = {
    "a detector for clips": (
        *(FPN, ("MODEL.BACKBONE.NAME", "build_gn_i3d_resnet_backbone")),
        *("MODEL.BACKBONE.NAME", "clips"),
    ),
    "clips that are too short": (
        *("Kinetics-Classification/I3D_R_50_32_gn", ("PRETRAIN.FRAMES", 6)),
        *("PRETRAIN.FRAMES", "at least 8"),
    ),
    "weights of a ResNet in a VGG": (
        *("COCO-Detection/faster_rcnn_VGG_16_1x", ("MODEL.WEIGHTS", PUBLISHED)),
        *("MODEL.WEIGHTS", "it holds a ResNet"),
    ),
    "recomputation with native norms": (
        FPN,
        ("MODEL.GROUP_NORM.IMPL", "native", "MODEL.GROUP_NORM.RECOMPUTE", "block"),
        *("MODEL.GROUP_NORM.RECOMPUTE", "set MODEL.GROUP_NORM.IMPL fused"),
    ),
    "unknown implementation": (
        *(FPN, ("MODEL.GROUP_NORM.IMPL", "quick")),
        *("MODEL.GROUP_NORM.IMPL", "one of fused, native"),
    ),
    "unknown level of recomputation": (
        *(FPN, ("MODEL.GROUP_NORM.RECOMPUTE", "all")),
        *("MODEL.GROUP_NORM.RECOMPUTE", "one of none, norm, conv3, block"),
    ),
    "frozen stages from scratch": (
        FPN,
        ("MODEL.WEIGHTS", ""),
        "MODEL.BACKBONE.FREEZE_AT",
        "MODEL.WEIGHTS is empty",
    ),
    "FrozenBN from scratch": (
        *(FROZEN, ("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0)),
        *("MODEL.RESNETS.NORM", "MODEL.WEIGHTS is empty"),
    ),
    "BN backbone in a GN model": (
        FPN,
        (
            *("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"),
            *("MODEL.RESNETS.STRIDE_IN_1X1", True),
        ),
        *("MODEL.WEIGHTS", "trained with BatchNorm"),
    ),
    "GN backbone in a BN model": (
        FROZEN,
        (
            *("MODEL.WEIGHTS", "catalog://ImageNetPretrained/FAIR/R-50-GN"),
            *("MODEL.RESNETS.STRIDE_IN_1X1", False),
        ),
        *("MODEL.WEIGHTS", "trained with Group Normalization"),
    ),
    "GN backbone in an LN model": (
        *(FPN, ("MODEL.RESNETS.NORM", "LN"), "MODEL.WEIGHTS", "Group Normalization"),
    ),
    "Detectron's address of the GN backbone": (
        FROZEN,
        (
            *("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.WEIGHTS"),
            "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47261647/R-50-GN.pkl",
        ),
        *("MODEL.WEIGHTS", "Group Normalization"),
    ),
    "fused BN, unfrozen": (
        *(UNFROZEN, ("MODEL.WEIGHTS", "catalog://ImageNetPretrained/MSRA/R-50")),
        *("MODEL.WEIGHTS", "fused"),
    ),
    "wrong depth": (FPN, ("MODEL.RESNETS.DEPTH", 101), "MODEL.RESNETS.DEPTH", "trained with 50"),
    "stride": (
        *(FPN, ("MODEL.RESNETS.STRIDE_IN_1X1", True)),
        *("MODEL.RESNETS.STRIDE_IN_1X1", "trained with False"),
    ),
    "stride of MSRA weights": (
        *(FROZEN, ("MODEL.RESNETS.STRIDE_IN_1X1", False)),
        *("MODEL.RESNETS.STRIDE_IN_1X1", "trained with True"),
    ),
    "color order": (FPN, ("INPUT.FORMAT", "RGB"), "INPUT.FORMAT", "trained with BGR"),
    "mean": (
        *(FPN, ("MODEL.PIXEL_MEAN", "[123.675,116.28,103.53]")),
        *("MODEL.PIXEL_MEAN", r"[103.53, 116.28, 123.675]"),
    ),
    "std": (
        *(FPN, ("MODEL.PIXEL_STD", "[57.375,57.12,58.395]")),
        *("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
    ),
    "std of torchvision weights": (
        FROZEN,
        (
            *("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"),
            *("MODEL.RESNETS.STRIDE_IN_1X1", False, "INPUT.FORMAT", "RGB"),
            *("MODEL.PIXEL_MEAN", "[123.675,116.28,103.53]"),
        ),
        *("MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"),
    ),
    "weight standardization of plain weights": (
        *(FPN, ("MODEL.RESNETS.WEIGHT_STANDARDIZATION", True)),
        *("MODEL.RESNETS.WEIGHT_STANDARDIZATION", "was trained with False"),
    ),
    "mask norm on C4": (
        C4,
        ("MODEL.ROI_MASK_HEAD.NORM", "GN"),
        "MODEL.ROI_MASK_HEAD.NORM",
        "MODEL.ROI_MASK_HEAD.NUM_CONV is 0",
    ),
    "box norm on C4": (
        C4,
        ("MODEL.ROI_BOX_HEAD.NORM", "GN"),
        "MODEL.ROI_BOX_HEAD.NORM",
        "MODEL.RESNETS.NORM",
    ),
    "FPN norm on C4": (C4, ("MODEL.FPN.NORM", "GN"), "MODEL.FPN.NORM", "no FPN"),
    "box norm with 2fc": (
        *(FROZEN, ("MODEL.ROI_BOX_HEAD.NORM", "GN"), "MODEL.ROI_BOX_HEAD.NORM", "NUM_CONV is 0"),
    ),
    "zero gamma of FrozenBN": (
        *(FROZEN, ("MODEL.RESNETS.ZERO_INIT_RESIDUAL", True)),
        *("MODEL.RESNETS.ZERO_INIT_RESIDUAL", "FrozenBN"),
    ),
    "groups and channels per group": (
        SCRATCH,
        ("MODEL.GROUP_NORM.NUM_GROUPS", 8, "MODEL.GROUP_NORM.DIM_PER_GP", 16),
        *("MODEL.GROUP_NORM.DIM_PER_GP", "MODEL.GROUP_NORM.NUM_GROUPS is also set, to 8"),
    ),
    "neither groups nor channels per group": (
        SCRATCH,
        ("MODEL.GROUP_NORM.NUM_GROUPS", -1),
        *("MODEL.GROUP_NORM.NUM_GROUPS", "MODEL.GROUP_NORM.DIM_PER_GP is not set"),
    ),
    "groups that do not divide the channels": (
        *(SCRATCH, ("MODEL.GROUP_NORM.NUM_GROUPS", 24)),
        *("MODEL.GROUP_NORM.NUM_GROUPS", "channels do not divide into 24 groups (use 16 or 32)"),
    ),
    "channels per group that do not divide the channels": (
        *(C4, ("MODEL.GROUP_NORM.DIM_PER_GP", 48)),
        *("MODEL.GROUP_NORM.DIM_PER_GP", "backbone.stem.conv1: 64 channels"),
    ),
    "stock backbone, other groups": (
        SCRATCH,
        ("MODEL.GROUP_NORM.NUM_GROUPS", 16, "MODEL.BACKBONE.NAME", STOCK["BACKBONE"]),
        *("MODEL.BACKBONE.NAME", "build_gn_resnet_fpn_backbone"),
    ),
    "stock box head, other groups": (
        SCRATCH,
        ("MODEL.GROUP_NORM.DIM_PER_GP", 16, "MODEL.ROI_BOX_HEAD.NAME", STOCK["ROI_BOX_HEAD"]),
        *("MODEL.ROI_BOX_HEAD.NAME", "GNFastRCNNConvFCHead"),
    ),
    "groups in the heads that do not divide the channels": (
        *(SCRATCH, ("MODEL.GROUP_NORM.HEADS_NUM_GROUPS", 24)),
        *("MODEL.GROUP_NORM.HEADS_NUM_GROUPS", "backbone.fpn_lateral2: 256 channels"),
    ),
    "channels per group in the heads that do not divide the channels": (
        *(SCRATCH, ("MODEL.GROUP_NORM.HEADS_DIM_PER_GP", 24)),
        *("MODEL.GROUP_NORM.HEADS_DIM_PER_GP", "backbone.fpn_lateral2: 256 channels"),
    ),
    "stock box head, other channels per group in the heads": (
        SCRATCH,
        (
            *("MODEL.GROUP_NORM.HEADS_DIM_PER_GP", 16),
            *("MODEL.ROI_BOX_HEAD.NAME", STOCK["ROI_BOX_HEAD"]),
        ),
        *("MODEL.ROI_BOX_HEAD.NAME", "GNFastRCNNConvFCHead"),
    ),
    "stock box head, other groups in the heads": (
        SCRATCH,
        (
            *("MODEL.GROUP_NORM.HEADS_NUM_GROUPS", 16),
            *("MODEL.ROI_BOX_HEAD.NAME", STOCK["ROI_BOX_HEAD"]),
        ),
        *("MODEL.ROI_BOX_HEAD.NAME", "GNFastRCNNConvFCHead"),
    ),
    "stock mask head, other epsilon": (
        SCRATCH,
        ("MODEL.GROUP_NORM.EPSILON", 1e-3, "MODEL.ROI_MASK_HEAD.NAME", STOCK["ROI_MASK_HEAD"]),
        *("MODEL.ROI_MASK_HEAD.NAME", "GNMaskRCNNConvUpsampleHead"),
    ),
    "stock C4 heads, zero gamma": (
        C4,
        ("MODEL.RESNETS.ZERO_INIT_RESIDUAL", True, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
        *("MODEL.ROI_HEADS.NAME", "ZERO_INIT_RESIDUAL"),
    ),
    "steps out of order": (
        FPN,
        ("SOLVER.STEPS", "(160000,120000)"),
        "SOLVER.STEPS",
        "do not increase",
    ),
    "the same step twice": (FPN, ("SOLVER.STEPS", "(9,9)"), "SOLVER.STEPS", "do not increase"),
    "step at the end": (FPN, ("SOLVER.MAX_ITER", 160000), "SOLVER.STEPS", "[160000]"),
    "steps past the end": (FPN, ("SOLVER.MAX_ITER", 130000), "SOLVER.STEPS", "[160000]"),
    "classes": (
        *(FPN, ("MODEL.ROI_HEADS.NUM_CLASSES", 7)),
        *(
            "MODEL.ROI_HEADS.NUM_CLASSES",
            "coco_2017_train has 80 and coco_2017_val has 80 categories",
        ),
    ),
    "decay": (
        FPN,
        ("SOLVER.WEIGHT_DECAY_NORM", 1e-4),
        "SOLVER.WEIGHT_DECAY_NORM",
        "set SOLVER.WEIGHT_DECAY_NORM 0.0",
    ),
    "BN with one image": (
        *(UNFROZEN, ("SOLVER.IMS_PER_BATCH", 8)),
        *("SOLVER.IMS_PER_BATCH", "backbone.bottom_up.res3.0.shortcut.norm is BatchNorm"),
    ),
    "BN with one image per pass": (
        *(UNFROZEN, ("SOLVER.ACCUMULATE_ITERS", 2), "SOLVER.IMS_PER_BATCH", "single image"),
    ),
    "passes that do not divide the batch": (
        *(FPN, ("SOLVER.ACCUMULATE_ITERS", 3), "SOLVER.ACCUMULATE_ITERS", "2 images per GPU"),
    ),
    "batch that the GPUs do not divide": (
        *(FPN, ("SOLVER.IMS_PER_BATCH", 12), "SOLVER.IMS_PER_BATCH", "use a multiple of 8"),
    ),
    "batch that REFERENCE_WORLD_SIZE does not divide": (
        FPN,
        ("SOLVER.IMS_PER_BATCH", 12, "SOLVER.REFERENCE_WORLD_SIZE", 8),
        *("SOLVER.REFERENCE_WORLD_SIZE", "set SOLVER.REFERENCE_WORLD_SIZE 0"),
    ),
    "unknown norm": (SCRATCH, ("MODEL.RESNETS.NORM", "GNN"), "MODEL.META_ARCHITECTURE", "GNN"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    name, opts, key, text = MISTAKES[mistake]
    messages = problems(config(name, *opts))
    assert set(messages) == {key}, "exactly one problem"
    assert text in messages[key]


def test_sync_bn_counts_the_images_of_all_gpus():
    """One image on each of 8 GPUs is a batch of 8 for SyncBN."""
    cfg = config(SYNC, "SOLVER.IMS_PER_BATCH", 8)
    assert problems(cfg, num_gpus=8) == {}
    alone = config(SYNC, "SOLVER.IMS_PER_BATCH", 1)
    assert set(problems(alone, num_gpus=1)) == {"SOLVER.IMS_PER_BATCH"}


def test_sync_bn_needs_gpus():
    messages = problems(config(SYNC, "MODEL.DEVICE", "cpu"), num_gpus=2)
    assert set(messages) == {"MODEL.DEVICE"} and "SyncBatchNorm" in messages["MODEL.DEVICE"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("AMP.DTYPE", "float64"), ("KEEP_CHECKPOINTS", -1), ("SKIP_BAD_BATCHES", -1)],
)
def test_keys_of_gn_det_in_solver(key, value):
    assert set(problems(config(FPN, f"SOLVER.{key}", value))) == {f"SOLVER.{key}"}


def test_all_problems_are_reported_at_once():
    cfg = config(
        *(FPN, "MODEL.WEIGHTS", "", "MODEL.GROUP_NORM.NUM_GROUPS", 24, "SOLVER.MAX_ITER", 10),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "SOLVER.WEIGHT_DECAY_NORM", 1e-4),
    )
    assert set(problems(cfg)) == {
        "MODEL.BACKBONE.FREEZE_AT",
        "MODEL.GROUP_NORM.NUM_GROUPS",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "SOLVER.STEPS",
        "SOLVER.WEIGHT_DECAY_NORM",
    }


CORRECT = {
    "Table 3, number of groups": [
        (SCRATCH, ("MODEL.GROUP_NORM.NUM_GROUPS", 2**i)) for i in range(7)
    ],
    "stock heads with their own grouping": [
        (
            SCRATCH,
            (
                *("MODEL.GROUP_NORM.DIM_PER_GP", 16, "MODEL.GROUP_NORM.HEADS_NUM_GROUPS", 32),
                *("MODEL.ROI_BOX_HEAD.NAME", STOCK["ROI_BOX_HEAD"]),
                *("MODEL.ROI_MASK_HEAD.NAME", STOCK["ROI_MASK_HEAD"]),
            ),
        )
    ],
    "Table 3, channels per group": [
        (SCRATCH, ("MODEL.GROUP_NORM.DIM_PER_GP", 2**i)) for i in range(7)
    ],
    "channels per group as in Detectron": [
        (SCRATCH, ("MODEL.GROUP_NORM.DIM_PER_GP", 16, "MODEL.GROUP_NORM.NUM_GROUPS", -1))
    ],
    "another grouping than that of the weights": [(FPN, ("MODEL.GROUP_NORM.NUM_GROUPS", 16))],
    "pixel mean of Detectron": [(FPN, ("MODEL.PIXEL_MEAN", "[102.9801,115.9465,122.7717]"))],
    "published weights under other names": [
        (FPN, ("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/FAIR/R-50-GN.pkl")),
        (FROZEN, ("MODEL.WEIGHTS", "catalog://ImageNetPretrained/MSRA/R-50")),
        (FROZEN, ("MODEL.WEIGHTS", "https://example.org/my_own_backbone.pth")),
    ],
    "boxes only": [(FPN, ("MODEL.MASK_ON", False)), (C4, ("MODEL.MASK_ON", False))],
    "stock builders with their own grouping": [
        (FPN, [word for part, name in STOCK.items() for word in (f"MODEL.{part}.NAME", name)])
    ],
    "cosine schedule": [
        (FPN, ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", 100))
    ],
    "no steps": [(FPN, ("SOLVER.STEPS", "()", "SOLVER.MAX_ITER", 100))],
    "all BN frozen, one image": [
        (UNFROZEN, ("SOLVER.IMS_PER_BATCH", 8, "MODEL.BACKBONE.FREEZE_AT", 5))
    ],
    "weight decay without trained norms": [(FROZEN, ("SOLVER.WEIGHT_DECAY_NORM", 1e-4))],
    "another architecture": [
        (
            FPN,
            (
                *("MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.MASK_ON", False),
                *("MODEL.ROI_HEADS.NUM_CLASSES", 3),
            ),
        )
    ],
}


@pytest.mark.parametrize("case", CORRECT)
def test_correct_configs_pass(case):
    for name, opts in CORRECT[case]:
        assert problems(config(name, *opts)) == {}, opts


def test_another_grouping_than_that_of_the_weights_is_a_warning(caplog):
    gn_det.check_config(config(FPN, "MODEL.GROUP_NORM.NUM_GROUPS", 16), 8)
    assert "R-50-GN was trained with 32 groups" in caplog.text


def test_the_trainer_logs_the_warning_once(caplog, monkeypatch, tmp_path):
    words = [*TINY, "OUTPUT_DIR", tmp_path, "MODEL.BACKBONE.FREEZE_AT", 0]
    cfg = config("Shapes/mask_rcnn_R_18_FPN_gn", *words)
    model = Trainer.build_model(cfg)
    groups = {"MODEL.GROUP_NORM.NUM_GROUPS": 16, "MODEL.GROUP_NORM.DIM_PER_GP": -1}
    facts = {"MODEL.RESNETS.NORM": "GN", **groups}
    torch.save(
        {"model": model.backbone.bottom_up.state_dict(), "gn_det": facts}, tmp_path / "b.pth"
    )
    # Detectron2's loggers do not propagate to caplog's
    logger = logging.getLogger("gn_det.check")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    Trainer(config("Shapes/mask_rcnn_R_18_FPN_gn", *words, "MODEL.WEIGHTS", tmp_path / "b.pth"))
    warnings = [r for r in caplog.records if "trained with 16 groups" in r.getMessage()]
    assert len(warnings) == 1


def test_classes_of_a_custom_dataset(tmp_path):
    path = tmp_path / "mine.json"
    categories = [{"id": 5, "name": "cell"}, {"id": 9, "name": "dust"}]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    register_coco_instances("mine", {}, str(path), str(tmp_path))
    sets = ("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)")
    assert "mine has 2 categories" in problems(config(FPN, *sets))["MODEL.ROI_HEADS.NUM_CLASSES"]
    assert problems(config(FPN, *sets, "MODEL.ROI_HEADS.NUM_CLASSES", 2)) == {}


def caffe2(kind: str, folder: Path) -> str:
    """A file in the format of Detectron: pickled arrays with Caffe2 names."""
    array = np.zeros(4, dtype=np.float32)
    branch = "res2_0_branch2a"
    blobs = {f"{branch}_w": array, f"{branch}_{kind}_s": array, f"{branch}_{kind}_b": array}
    path = folder / f"{kind}.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    return str(path)


def torch_file(kind: str, folder: Path) -> str:
    """A file in the format of Detectron2."""
    norm = {"bn": nn.BatchNorm2d(4), "gn": nn.GroupNorm(2, 4)}[kind]
    path = folder / f"{kind}.pth"
    layer = "res2.0.conv1"
    state = {f"{layer}.norm.{key}": value for key, value in norm.state_dict().items()}
    state[f"{layer}.weight"] = torch.zeros(4)
    torch.save({"model": state, "matching_heuristics": True}, path)
    return str(path)


@pytest.mark.parametrize("write", [caffe2, torch_file])
def test_the_norm_of_a_file_is_recognized_by_its_tensors(write, tmp_path):
    bn, gn = write("bn", tmp_path), write("gn", tmp_path)
    for name, path in ((FPN, bn), (FROZEN, gn)):
        assert "was trained with" in problems(config(name, "MODEL.WEIGHTS", path))["MODEL.WEIGHTS"]
    assert problems(config(FROZEN, "MODEL.WEIGHTS", bn)) == {}
    for norm in ("GN", "LN"):
        assert problems(config(FPN, "MODEL.WEIGHTS", gn, "MODEL.RESNETS.NORM", norm)) == {}


def test_the_stride_in_a_file_is_checked(tmp_path):
    """Names and shapes of tensors do not depend on STRIDE_IN_1X1."""
    path = tmp_path / "backbone.pth"
    state = {"res2.0.conv1.weight": torch.zeros(4)}
    for trained in (True, False):
        facts = {"MODEL.RESNETS.STRIDE_IN_1X1": trained}
        torch.save({"model": state, "gn_det": facts}, path)
        for stride in (True, False):
            cfg = config(FPN, "MODEL.WEIGHTS", path, "MODEL.RESNETS.STRIDE_IN_1X1", stride)
            assert set(problems(cfg)) == (set() if stride is trained else {*facts})


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_code_in_files_is_not_run(suffix, tmp_path):
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps({"model": Malicious(tmp_path / "touched")}))
    assert path.name in problems(config(FPN, "MODEL.WEIGHTS", path))["MODEL.WEIGHTS"]
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"not weights", pickle.dumps([1, 2])])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_files_without_weights(suffix, content, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    assert set(problems(config(FPN, "MODEL.WEIGHTS", path))) == {"MODEL.WEIGHTS"}


@pytest.mark.parametrize(
    ("opts", "rate"),
    [
        (("SOLVER.IMS_PER_BATCH", "2"), "0.0025"),
        (("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.02"), None),
        (("SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_WORLD_SIZE", "1"), None),
        (("SOLVER.IMS_PER_BATCH", "16"), None),
        ((), None),
    ],
)
def test_a_batch_without_its_learning_rate(opts, rate):
    """Two images at the rate of 16: the linear rule's values are named."""
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn.yaml"
    text = unscaled_batch(read_config(name), read_config(name, opts), opts[::2])
    assert bool(text) == bool(rate)
    if rate:
        assert f"SOLVER.BASE_LR {rate}, SOLVER.MAX_ITER 1440000 " in text


def test_the_trainer_checks_its_config(tmp_path):
    """Also when it is used from Python."""
    words = ["MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = config("Shapes/mask_rcnn_R_18_FPN_gn", *TINY, *words)
    with pytest.raises(InputError, match=r"MODEL.BACKBONE.FREEZE_AT 2: .* set .* 0"):
        Trainer(cfg)
    assert not (tmp_path / "run").exists()
