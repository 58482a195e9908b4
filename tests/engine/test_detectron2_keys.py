"""Every key of Detectron2 0.6 has a reader in the trainings of this project."""

import contextlib
from collections.abc import Iterator

import pytest
import yacs.config
from conftest import SCRATCH, shapes_config
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.modeling import GeneralizedRCNNWithTTA

from gn_det.config import flatten
from gn_det.engine.trainer import Trainer

# Keys that no training reads, with the reason
UNREAD = {
    "CUDNN_BENCHMARK": "Detectron2's default_setup reads it before there is a trainer",
    "GLOBAL.HACK": "for experiments of Detectron2's users; nothing reads it",
    "VERSION": "of the config, read when a file is merged",
}
PROPOSALS = ("MODEL.LOAD_PROPOSALS", True)
# Architectures and options that have keys of their own
CASES = (
    (),
    ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    ("MODEL.META_ARCHITECTURE", "PanopticFPN"),
    ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3),
    ("INPUT.CROP.ENABLED", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True),
    ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
    ("TEST.PRECISE_BN.ENABLED", True, "MODEL.RESNETS.NORM", "BN"),
    ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"),
    ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
    (*PROPOSALS, "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
)
RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 6),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 6, "MODEL.FPN.IN_FEATURES", ("res3", "res4", "res5")),
    *("MODEL.BACKBONE.NAME", "build_gn_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ("res3", "res4", "res5")),
)


@pytest.fixture
def read(monkeypatch) -> Iterator[set[str]]:
    """Full names of all keys that have been read as attributes, of configs that were labelled."""
    found: set[str] = set()
    get = yacs.config.CfgNode.__getattr__

    def record(node, name):
        if name in node and "_prefix" in node.__dict__:
            found.add(node.__dict__["_prefix"] + name)
        return get(node, name)

    monkeypatch.setattr(yacs.config.CfgNode, "__getattr__", record)
    # They read keys only to refuse values
    monkeypatch.setattr(Trainer, "check_recipe", lambda self, cfg: None)
    monkeypatch.setattr(Trainer, "check_architecture", lambda self, cfg: None)
    return found


def label(cfg, prefix: str = "") -> None:
    """Give every node of a config, and its copies, the prefix of its keys."""
    cfg.__dict__["_prefix"] = prefix
    for name, value in cfg.items():
        if isinstance(value, yacs.config.CfgNode):
            label(value, f"{prefix}{name}.")


def exercise(cfg, train: bool) -> None:
    """Build all that a training and an evaluation need, and load a batch or train."""
    trainer = Trainer(cfg)
    if train:
        trainer.train()
        GeneralizedRCNNWithTTA(cfg, trainer.model)
        return
    trainer.data_loader.start_at(0, 0)
    next(iter(trainer.data_loader))
    trainer.build_evaluator(cfg, "shapes_val")
    trainer.build_test_loader(cfg, "shapes_val")


@pytest.mark.skipif(
    "RANDOM_SUBSET_RATIO" in get_cfg().DATALOADER, reason="newer Detectron2 has more keys"
)
def test_every_key_is_read(read, tmp_path):
    cases = [("mask_rcnn_R_18_FPN_gn", case) for case in (*CASES, RETINANET)]
    for config, case in (*cases, ("mask_rcnn_R_50_C4_gn", ())):
        schedule = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "OUTPUT_DIR", tmp_path)
        cfg = shapes_config(config, *SCRATCH, *schedule, *case)
        label(cfg)
        # `shapes` has no key points, proposals or rotated boxes
        unusable = AssertionError, KeyError, ValueError, NotImplementedError
        with contextlib.suppress(*unusable if case else ()):
            exercise(cfg, train=not case and "FPN" in config)
        if PROPOSALS[0] in case:
            for is_train in (True, False):
                DatasetMapper(cfg, is_train)
            with contextlib.suppress(IndexError):
                Trainer.build_test_loader(cfg, "shapes_val")
    assert set(flatten(get_cfg())) - read == set(UNREAD)
