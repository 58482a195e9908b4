"""Strict loading: weights that do not match the model abort training."""

import os
import pickle
import re

import pytest
import torch
from conftest import ROOT, TINY, shapes_config
from detectron2.layers import DeformConv
from detectron2.modeling import build_model

from gn_det.checkpoint.checkpointer import StrictCheckpointer
from gn_det.engine.train import Trainer, run
from gn_det.errors import InputError
from gn_det.modeling import build_on_meta_device

GN, FROZEN = "mask_rcnn_R_18_FPN_gn", "mask_rcnn_R_18_FPN_frozenbn"


@pytest.fixture(scope="module")
def detectors() -> dict:
    return {name: build_model(shapes_config(name)) for name in (GN, FROZEN)}


def backbone(model) -> dict:
    return dict(model.backbone.bottom_up.state_dict())


def without_backbone(model) -> dict:
    return {n: t for n, t in model.state_dict().items() if "bottom_up" not in n}


def save(state: dict, path, **more) -> str:
    torch.save({"model": state, "matching_heuristics": True, **more}, path)
    return str(path)


def load(model, path: str, complete: bool = False):
    checkpointer = StrictCheckpointer(model, complete=complete)
    checkpointer.load(path, checkpointables=[])
    return checkpointer.loaded


@pytest.mark.parametrize("name", [GN, FROZEN])
def test_a_backbone(name, detectors, tmp_path, caplog):
    """All tensors of the backbone are loaded, and none of the heads."""
    model = detectors[name]
    state = backbone(model) | {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
    with caplog.at_level("INFO"):
        loaded = load(model, save(state, tmp_path / "backbone.pth"))
    names = {n for n in model.state_dict() if n.startswith("backbone.bottom_up.")}
    assert {*loaded.model} - loaded.fresh == names
    count = {GN: 60, FROZEN: 100}[name]
    assert re.search(rf"loaded +{count} tensors: ResNet {count}\n", caplog.text)
    assert re.search(r"initialised +\d+ tensors: .*RPN 6", caplog.text)
    assert re.search(r"not used +2 tensors: fc 2\n", caplog.text)


def change(state: dict, key: str, value) -> dict:
    state = dict(state)
    assert key in state
    if value is None:
        del state[key]
    else:
        state[key] = value
    return state


NORM = "res3.0.conv1.norm"
MISTAKES = {
    "GN in a BN model": (FROZEN, lambda d: backbone(d[GN]), "Group Normalization.*BatchNorm"),
    "BN in a GN model": (GN, lambda d: backbone(d[FROZEN]), "BatchNorm.*Group Normalization"),
    "a missing tensor": (
        *(GN, lambda d: change(backbone(d[GN]), f"{NORM}.bias", None)),
        rf"backbone\.bottom_up\.{NORM}\.bias is missing",
    ),
    "another shape": (
        *(GN, lambda d: change(backbone(d[GN]), f"{NORM}.bias", torch.ones(7))),
        rf"{NORM}\.bias has another shape",
    ),
    "an unknown tensor": (
        *(GN, lambda d: backbone(d[GN]) | {"res3.0.conv9.weight": torch.ones(7)}),
        r"no tensor res3\.0\.conv9\.weight",
    ),
    "no match": (GN, lambda d: {"layer1.0.conv1.weight": torch.ones(2)}, "none of its tensors"),
    "a plain FPN": (
        *(GN, lambda d: without_backbone(d[FROZEN]) | backbone(d[GN])),
        r"backbone\.fpn_\S+ is missing",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, detectors, tmp_path):
    name, make, words = MISTAKES[mistake]
    path = save(make(detectors), tmp_path / "w.pth")
    with pytest.raises(InputError, match=words) as error:
        load(build_model(shapes_config(name)), path)
    fixes = {
        "GN in a BN model": "change MODEL.RESNETS.NORM",
        "BN in a GN model": f"{path} {tmp_path}/w_gn.pth --norm GN --calibrate IMAGES`",
    }
    fix = fixes.get(
        mistake, f"`python tools/convert_backbone.py {path} {tmp_path}/w_detectron2.pth`"
    )
    assert fix in str(error.value)


def test_a_detector_for_other_classes(detectors, tmp_path):
    """Predictors of other classes keep their initial values; for evaluation that is an error."""
    path = save(detectors[GN].state_dict(), tmp_path / "detector.pth")
    model = build_model(shapes_config(GN, "MODEL.ROI_HEADS.NUM_CLASSES", 3))
    loaded = load(model, path)
    assert (
        loaded.fresh
        == loaded.misshapen
        == {
            *(f"roi_heads.box_predictor.cls_score.{kind}" for kind in ("weight", "bias")),
            *(f"roi_heads.box_predictor.bbox_pred.{kind}" for kind in ("weight", "bias")),
            *(f"roi_heads.mask_head.predictor.{kind}" for kind in ("weight", "bias")),
        }
    )
    with pytest.raises(InputError, match=r"roi_heads\.box_predictor\S+ has another shape"):
        load(model, path, complete=True)


@pytest.mark.parametrize("other", ["retinanet", "keypoint", "panoptic"])
def test_other_architectures_for_other_classes(other, tmp_path):
    """Only the last layers have other shapes, and the weights are accepted."""
    changes = {
        "retinanet": {
            "MODEL.META_ARCHITECTURE": "RetinaNet",
            "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
            "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
            "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        },
        "keypoint": {"MODEL.KEYPOINT_ON": True, "MODEL.MASK_ON": False},
        "panoptic": {"MODEL.META_ARCHITECTURE": "PanopticFPN"},
    }[other]
    classes = {
        "retinanet": "MODEL.RETINANET.NUM_CLASSES",
        "keypoint": "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
        "panoptic": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    }[other]
    words = [word for pair in changes.items() for word in pair]
    one, two = (build_model(shapes_config(FROZEN, *words, classes, n)) for n in (5, 7))
    loaded = load(two, save(one.state_dict(), tmp_path / "detector.pth"))
    assert loaded.fresh and loaded.fresh == loaded.misshapen and not loaded.unused


@pytest.mark.skipif(
    not issubclass(DeformConv, torch.nn.Module),
    reason="Detectron2's main branch needs its C++ extension for deformable convolutions",
)
def test_deformable_convolutions_start_from_plain_ones(detectors, tmp_path):
    """ImageNet weights do not contain the offsets."""
    r50 = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
    path = save(backbone(build_model(shapes_config(FROZEN, *r50))), tmp_path / "R-50.pth")
    stages = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]]
    loaded = load(build_on_meta_device(shapes_config(FROZEN, *r50, *stages)), path)
    offsets = {name for name in loaded.model if "conv2_offset" in name}
    assert len(offsets) == 26 and offsets <= loaded.fresh


def test_names_without_matching_heuristics(detectors, tmp_path):
    """Without `matching_heuristics` names are not matched by suffix, and shapes are not blamed."""
    path = save(backbone(detectors[GN]), tmp_path / "backbone.pth", matching_heuristics=False)
    with pytest.raises(InputError, match=r"none of its tensors .*convert_backbone\.py"):
        load(detectors[GN], path)
    partly = backbone(detectors[GN]) | {
        "backbone.bottom_up.stem.conv1.weight": torch.ones(64, 3, 7, 7)
    }
    path = save(partly, tmp_path / "partly.pth", matching_heuristics=False)
    with pytest.raises(InputError, match="is missing"):
        load(detectors[GN], path)


def test_loading_after_an_error(detectors, tmp_path):
    """After an error the same checkpointer can load another file."""
    checkpointer = StrictCheckpointer(detectors[GN])
    with pytest.raises(InputError):
        checkpointer.load(save(backbone(detectors[FROZEN]), tmp_path / "bn.pth"), [])
    checkpointer.load(save(backbone(detectors[GN]), tmp_path / "gn.pth"), [])
    assert checkpointer.loaded.fresh < {*checkpointer.loaded.model}


def test_fused_bn_in_a_gn_model(detectors, tmp_path):
    """Detectron2 would load every tensor without a warning."""
    branches = {"shortcut": "1", "conv1": "2a", "conv2": "2b"}
    blobs = {}
    for name, tensor in backbone(detectors[GN]).items():
        place, _, kind = name.replace(".norm", "_bn").rpartition(".")
        for layer, branch in branches.items():
            place = place.replace(f".{layer}", f"_branch{branch}")
        place = place.replace("stem_branch2a_bn", "res_conv1_bn").replace("stem_branch2a", "conv1")
        suffix = {"bias": "b"}.get(kind, "s" if place.endswith("_bn") else "w")
        blobs[f"{place.replace('.', '_')}_{suffix}"] = tensor.numpy()
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps(blobs))
    with pytest.raises(InputError, match=r"BatchNorm.*R-18_gn\.pth --norm GN"):
        load(build_model(shapes_config(GN)), str(path))


def test_a_model_without_masks(detectors, tmp_path):
    """Tensors of a part that the model does not have are ignored."""
    path = save(detectors[GN].state_dict(), tmp_path / "detector.pth")
    loaded = load(build_model(shapes_config(GN, "MODEL.MASK_ON", False)), path)
    assert not loaded.fresh and all("mask_head" in name for name in loaded.unused)


def test_c4(tmp_path):
    """res5 is in the RoI head, but is still loaded from the backbone's file."""
    keys = ("MODEL.BACKBONE.NAME", "build_gn_resnet_backbone", "MODEL.RPN.IN_FEATURES", ["res4"])
    c4 = [
        *(*keys, "MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
        *("MODEL.ROI_HEADS.NAME", "GNRes5ROIHeads", "MODEL.ROI_BOX_HEAD.NAME", ""),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[32]], "MODEL.RESNETS.DEPTH", 50),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "MODEL.RESNETS.NORM", "GN"),
    ]
    cfg = shapes_config(GN, *c4)
    model = build_model(cfg)
    state = {
        name.removeprefix("backbone.").removeprefix("roi_heads."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("backbone.", "roi_heads.res5."))
    }
    assert len(state) == 159
    loaded = load(model, save(state, tmp_path / "backbone.pth"))
    assert len(loaded.model) - len(loaded.fresh) == 159 and not loaded.unused
    del state["res5.1.conv2.weight"]
    with pytest.raises(InputError, match=r"roi_heads\.res5\.1\.conv2\.weight is missing"):
        load(model, save(state, tmp_path / "short.pth"))


def test_training_rejects_incomplete_weights(detectors, tmp_path):
    path = save(change(backbone(detectors[GN]), f"{NORM}.bias", None), tmp_path / "short.pth")
    keys = ["MODEL.WEIGHTS", path, "OUTPUT_DIR", tmp_path / "run"]
    trainer = Trainer(shapes_config(GN, *keys))
    with pytest.raises(InputError, match=rf"short\.pth.*{NORM}\.bias"):
        trainer.resume_or_load(resume=False)


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("case", ["backbone", "batch norm", "code"])
def test_evaluation_needs_complete_weights_of_its_norm(case, detectors, tmp_path, shapes):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    if case == "code":
        path = tmp_path / "weights.pkl"
        path.write_bytes(pickle.dumps({"model": Malicious(trace)}))
    else:
        save(
            backbone(detectors[GN]) if case == "backbone" else detectors[FROZEN].state_dict(), path
        )
    expected = {
        "backbone": r"weights\.pth: .* is missing",
        "batch norm": "trained with BatchNorm",
        "code": r"weights\.pkl .*\bmkdir\b.*state_dict",
    }
    words = [*TINY, "MODEL.WEIGHTS", str(path), "OUTPUT_DIR", str(tmp_path / "run")]
    config = str(ROOT / "configs/Shapes/mask_rcnn_R_18_FPN_gn.yaml")
    with pytest.raises(SystemExit, match=f"(?s)error: .*{expected[case]}"):
        run(["--config-file", config, "--eval-only", *words])
    assert not trace.exists()
