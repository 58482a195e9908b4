"""`tools/predict.py`: results that survive an error, and names of its files."""

import json

import pytest
import torch
from conftest import shapes_config
from detectron2.structures import Boxes, Instances
from PIL import Image

import gn_det.engine.predict as module

CATEGORIES = [{"id": 7, "name": "nut"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images, and a model that finds one object in each, and fails at a red one."""
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn")

    def load_run(model, output, opts):
        output.mkdir(parents=True, exist_ok=True)
        return cfg, CATEGORIES

    def detect(image):
        if image[0, 0, 2] == 255:
            raise RuntimeError("out of memory")
        found = Instances(image.shape[:2], pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 9.0, 8.0]])))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        return {"instances": found}

    monkeypatch.setattr(module, "load_run", load_run)
    monkeypatch.setattr(module, "Predictor", lambda cfg: detect)
    (tmp_path / "images").mkdir()
    return tmp_path


def found(folder) -> list[dict]:
    return json.loads((folder / "out" / "coco_instances_results.json").read_text())


def test_an_error_does_not_lose_earlier_results(folder):
    for number, colour in enumerate(("blue", "green", "red", "blue")):
        Image.new("RGB", (20, 10), colour).save(folder / "images" / f"{number}.png")
    with pytest.raises(RuntimeError, match="out of memory"):
        module.run(["--model", "m", str(folder / "images"), "--output-dir", str(folder / "out")])
    assert [r["file_name"][-5:] for r in found(folder)] == ["0.png", "1.png"]
    assert found(folder)[0]["bbox"] == [1.0, 2.0, 8.0, 6.0] and found(folder)[0]["category_id"] == 7


def test_long_names(folder):
    """A drawing has a name of its own, which file systems allow."""
    name = "x" * 246 + ".png"
    Image.new("RGB", (20, 10)).save(folder / "images" / name)
    module.run(["--model", "m", str(folder / "images"), "--output-dir", str(folder / "out")])
    assert len(list((folder / "out").glob("*.jpg"))) == 1
    assert found(folder)[0]["file_name"].endswith(name)


@pytest.mark.parametrize("value", ["50", "-0.1", "nan"])
def test_scores_are_from_0_to_1(value, folder, capsys):
    with pytest.raises(SystemExit):
        module.run(["--model", "m", str(folder), "--min-score", value])
    assert "--min-score" in capsys.readouterr().err
