"""Exported models: the same detections as Detectron2's, also at other sizes and without any."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRATCH, command, shapes_config
from detectron2.modeling import build_model
from PIL import Image

from gn_det.engine import export
from gn_det.engine.export_formats import FORMATS
from gn_det.engine.predictor import load_predictor

CATEGORIES = [{"id": 10 * i, "name": f"class {i}"} for i in range(6)]
C4 = (
    *("MODEL.BACKBONE.NAME", "build_gn_resnet_backbone", "MODEL.ROI_HEADS.NAME", "GNRes5ROIHeads"),
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32,64]]"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 0, "MODEL.ROI_MASK_HEAD.NORM", ""),
    *("MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", "", "MODEL.ROI_BOX_HEAD.NUM_CONV", 0),
)

AGNOSTIC = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)


def trained(folder, *opts):
    """A folder like the `OUTPUT_DIR` of a training, of a model whose scores differ clearly."""
    folder.mkdir()
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH, *opts)
    torch.manual_seed(3)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if name.endswith("cls_score.weight"):
            parameter.data.normal_(0, 0.3)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "run.json").write_text(json.dumps({"categories": CATEGORIES}))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "gn")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noise of two sizes, in files."""
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(80, 100, 3), (120, 70, 3)]):
        noise = np.random.default_rng(number).integers(0, 256, size, np.uint8)
        Image.fromarray(noise).resize((size[1], size[0])).save(folder / f"{number}.png")
    return folder


def needs(kind: str) -> None:
    for package in FORMATS[kind].packages:
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def onnx_path(run_folder, images):
    """The model of `run_folder`, exported."""
    needs("onnx")
    export.run([*map(str, ["--model", run_folder, "--format", "onnx", images])])
    return run_folder / "model.onnx"


@pytest.mark.parametrize("kind", ["torchscript", "openvino"])
def test_formats(kind, run_folder, images, tmp_path, capsys):
    """The comparison in the command is against the model as Detectron2 runs it."""
    needs(kind)
    arguments = ["--model", run_folder, "--format", kind, images, "--output-dir", tmp_path]
    export.run([*map(str, arguments)])
    assert (tmp_path / FORMATS[kind].file).is_file()
    lines = capsys.readouterr().out.splitlines()
    assert sum("no objects" in line for line in lines) == 3
    assert sum("objects, 0 of them different" in line for line in lines) == 4


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.MASK_ON", False, "MODEL.GROUP_NORM.IMPL", "native"),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", *AGNOSTIC),
        C4,
    ],
    ids=["boxes", "cascade", "C4"],
)
def test_models(opts, images, tmp_path):
    needs("onnx")
    folder = trained(tmp_path / "run", *opts)
    export.run([*map(str, ["--model", folder, "--format", "onnx", images])])
    assert (folder / "model.onnx").is_file()


def test_a_wrong_model_is_not_written(run_folder, images, tmp_path, monkeypatch):
    """A format whose results are half a pixel off."""
    right = FORMATS["torchscript"]

    def shifted(path):
        model = right.load(path)
        return lambda image: [t + 0.5 if t.shape[-1:] == (4,) else t for t in model(image)]

    monkeypatch.setitem(export.FORMATS, "torchscript", right._replace(load=shifted))
    arguments = ["--model", run_folder, "--format", "torchscript", images, "--output-dir", tmp_path]
    with pytest.raises(SystemExit, match="boxes"):
        export.run([*map(str, arguments)])
    assert not list(tmp_path.iterdir())


def test_a_detection_that_does_not_exist(run_folder, images, tmp_path, monkeypatch):
    """OpenVINO found one where there was none."""
    right = FORMATS["torchscript"]

    def one_more(path):
        model = right.load(path)
        return lambda image: [torch.cat([t, t.new_zeros(1, *t.shape[1:])]) for t in model(image)]

    monkeypatch.setitem(export.FORMATS, "torchscript", right._replace(load=one_more))
    arguments = ["--model", run_folder, "--format", "torchscript", images, "--output-dir", tmp_path]
    with pytest.raises(SystemExit, match="1 objects instead of 0"):
        export.run([*map(str, arguments)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "opts, named",
    [
        (("MODEL.KEYPOINT_ON", "True"), "MODEL.KEYPOINT_ON"),
        (("MODEL.META_ARCHITECTURE", "PanopticFPN"), "MODEL.META_ARCHITECTURE"),
    ],
)
def test_refused(opts, named, run_folder, images):
    arguments = ["--model", run_folder, "--format", "torchscript", images, "--opts", *opts]
    with pytest.raises(SystemExit, match=named):
        export.run([*map(str, arguments)])


def test_missing_package(run_folder, images, monkeypatch):
    monkeypatch.setitem(export.FORMATS, "onnx", FORMATS["onnx"]._replace(packages=("no_package",)))
    with pytest.raises(SystemExit, match="pip install no_package"):
        export.run([*map(str, ["--model", run_folder, "--format", "onnx", images])])


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_run_onnx(image_format, onnx_path, images):
    """The script without PyTorch finds what Detectron2's predictor finds, mask by mask."""
    spec = importlib.util.spec_from_file_location("run_onnx", ROOT / "tools" / "run_onnx.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    session = script.onnxruntime.InferenceSession(str(onnx_path))
    about = json.loads(session.get_modelmeta().custom_metadata_map["gn_det"])
    assert about["categories"] == CATEGORIES and about["input_format"] == "BGR"
    properties = {"gn_det": json.dumps({**about, "input_format": image_format})}
    meta = SimpleNamespace(custom_metadata_map=properties)
    session = SimpleNamespace(run=session.run, get_modelmeta=lambda: meta)
    opts = ("MODEL.DEVICE", "cpu", "INPUT.FORMAT", image_format)
    predictor = load_predictor(onnx_path.parent, *opts)
    for path in sorted(images.glob("?.png")):
        image = np.asarray(Image.open(path))
        found, _ = script.detect(session, image)
        expected = predictor(np.ascontiguousarray(image[..., ::-1]))["instances"]
        np.testing.assert_allclose(found["boxes"], expected.pred_boxes.tensor, atol=1e-2)
        np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-4)
        assert found["classes"].tolist() == expected.pred_classes.tolist()
        # Pixels whose probability is one half may fall on either side
        assert (found["masks"] != expected.pred_masks.numpy()).mean() < 1e-3
        assert found["masks"].any()


def test_run_onnx_command(onnx_path, images, tmp_path):
    copy = tmp_path / "0.png"
    copy.write_bytes((images / "0.png").read_bytes())
    done = command("tools/run_onnx.py", onnx_path, copy, "--min-score", 0.1)
    assert done.returncode == 0, done.stderr
    assert "class" in done.stdout
    assert Image.open(f"{copy}.found.png").size == Image.open(copy).size


def test_detectron2_export_of_a_norm_without_rois(tmp_path):
    """Detectron2's own tools export a mask head, which gets no RoI in an image without objects."""
    needs("onnx")
    import onnxruntime

    head = build_model(shapes_config("mask_rcnn_R_18_FPN_gn", *SCRATCH)).eval().roi_heads.mask_head
    rois = torch.rand(3, 64, 14, 14)

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head.layers(x)

    torch.onnx.export(
        Layers().eval(),
        (rois,),
        str(tmp_path / "head.onnx"),
        opset_version=17,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": [0]},
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "head.onnx"))
    for x in (rois, rois[:0], rois[:1]):
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, head.layers(x).detach(), atol=1e-5)
