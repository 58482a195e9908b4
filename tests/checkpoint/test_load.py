"""Strict loading: what does not fit stops training, and all else is told."""

import re

import pytest
import torch
from conftest import ROOT, TINY, shapes_config
from detectron2.modeling import build_model

from gn_det.checkpoint.load import StrictCheckpointer
from gn_det.engine.train import Trainer, run
from gn_det.errors import InputError

GN, FROZEN = "mask_rcnn_R_18_FPN_gn", "mask_rcnn_R_18_FPN_frozenbn"


@pytest.fixture(scope="module")
def detectors() -> dict:
    return {name: build_model(shapes_config(name)) for name in (GN, FROZEN)}


def trunk(model) -> dict:
    return dict(model.backbone.bottom_up.state_dict())


def save(state: dict, path, **more) -> str:
    torch.save({"model": state, "matching_heuristics": True, **more}, path)
    return str(path)


def load(model, path: str, whole: bool = False):
    checkpointer = StrictCheckpointer(model, whole=whole)
    checkpointer.load(path, checkpointables=[])
    return checkpointer.loaded


@pytest.mark.parametrize("name", [GN, FROZEN])
def test_a_trunk(name, detectors, tmp_path, caplog):
    """All of the trunk is filled, and of the heads nothing."""
    model = detectors[name]
    state = trunk(model) | {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
    with caplog.at_level("INFO"):
        loaded = load(model, save(state, tmp_path / "trunk.pth"))
    names = {n for n in model.state_dict() if n.startswith("backbone.bottom_up.")}
    assert {*loaded.model} - loaded.fresh == names
    count = {GN: 60, FROZEN: 100}[name]
    assert re.search(rf"filled +{count} tensors: ResNet {count}\n", caplog.text)
    assert "at initialisation" in caplog.text and "RPN 6" in caplog.text
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
    "GN in a BN model": (FROZEN, lambda d: trunk(d[GN]), "it was trained with Group Norm"),
    "BN in a GN model": (GN, lambda d: trunk(d[FROZEN]), "another model, with a tensor .*running"),
    "a tensor short": (
        *(GN, lambda d: change(trunk(d[GN]), f"{NORM}.bias", None)),
        rf"in part only: backbone\.bottom_up\.{NORM}\.bias is not in it",
    ),
    "another shape": (
        *(GN, lambda d: change(trunk(d[GN]), f"{NORM}.bias", torch.ones(7))),
        rf"{NORM}\.bias has another shape there",
    ),
    "one too many": (
        *(GN, lambda d: trunk(d[GN]) | {"res3.0.conv9.weight": torch.ones(7)}),
        "another model, with a tensor res3.0.conv9.weight",
    ),
    "nothing fits": (GN, lambda d: {"layer1.0.conv1.weight": torch.ones(2)}, "none of its tensors"),
    "a plain FPN": (
        *(GN, lambda d: d[FROZEN].state_dict() | d[GN].backbone.bottom_up.state_dict()),
        "in part only",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, detectors, tmp_path):
    name, make, words = MISTAKES[mistake]
    path = save(make(detectors), tmp_path / "w.pth")
    with pytest.raises(InputError, match=words) as error:
        load(build_model(shapes_config(name)), path)
    assert f"`python tools/convert_backbone.py {path} {tmp_path}/w_detectron2.pth`" in str(
        error.value
    )


def test_a_detector_for_other_classes(detectors, tmp_path):
    """Predictors are made anew for other classes; for evaluation that is a mistake."""
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
    with pytest.raises(InputError, match=r"in part only: roi_heads\.box_predictor"):
        load(model, path, whole=True)


def test_a_model_without_masks(detectors, tmp_path):
    """A part that the model does not have at all is no mistake."""
    path = save(detectors[GN].state_dict(), tmp_path / "detector.pth")
    loaded = load(build_model(shapes_config(GN, "MODEL.MASK_ON", False)), path)
    assert not loaded.fresh and all("mask_head" in name for name in loaded.unused)


def test_c4(tmp_path):
    """res5 lies in the RoI head, and comes from the trunk's file all the same."""
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
    loaded = load(model, save(state, tmp_path / "trunk.pth"))
    assert len(loaded.model) - len(loaded.fresh) == 159 and not loaded.unused
    del state["res5.1.conv2.weight"]
    with pytest.raises(InputError, match=r"roi_heads\.res5\.1\.conv2\.weight is not in it"):
        load(model, save(state, tmp_path / "short.pth"))


def test_training_stops_before_it_starts(detectors, tmp_path):
    path = save(change(trunk(detectors[GN]), f"{NORM}.bias", None), tmp_path / "short.pth")
    keys = ["MODEL.WEIGHTS", path, "OUTPUT_DIR", tmp_path / "run"]
    trainer = Trainer(shapes_config(GN, *keys))
    with pytest.raises(InputError, match="in part only"):
        trainer.resume_or_load(resume=False)


def test_evaluation_takes_whole_models_only(detectors, tmp_path, shapes):
    path = save(trunk(detectors[GN]), tmp_path / "trunk.pth")
    words = [*TINY, "MODEL.WEIGHTS", path, "OUTPUT_DIR", str(tmp_path / "run")]
    config = str(ROOT / "configs/Shapes/mask_rcnn_R_18_FPN_gn.yaml")
    with pytest.raises(SystemExit, match=r"error: MODEL\.WEIGHTS .* in part only"):
        run(["--config-file", config, "--eval-only", *words])
