"""Annotations that are valid JSON, but do not mean what COCO means; all through `clean`."""

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from gn_det.data.clean import Source, clean
from gn_det.data.registered import inspect_source


def cleaned(content: dict, folder: Path):
    path = folder / "data.json"
    path.write_text(json.dumps(content))
    return clean(Source(path, folder / "images"))


def kinds(data) -> dict[str, tuple[int, bool]]:
    return {finding.description: (finding.count, finding.fatal) for finding in data.findings}


def test_right_data_have_no_findings(content, tmp_path):
    data = cleaned(content, tmp_path)
    assert not data.findings and len(data.content["annotations"]) == 20


@pytest.mark.parametrize(("every", "fatal"), [(4, False), (1, True)])
def test_crowds_are_counted(every, fatal, content, tmp_path):
    """An exporter's default for all objects would train nothing."""
    for annotation in content["annotations"][::every]:
        annotation["iscrowd"] = 1
    ((_, found),) = [(k, v) for k, v in kinds(cleaned(content, tmp_path)).items() if "iscrowd" in k]
    assert found == (len(content["annotations"][::every]), fatal)


@pytest.mark.parametrize("value", ["1", 2, -1, [1]])
def test_invalid_crowds(value, content, tmp_path):
    content["annotations"][3]["iscrowd"] = value
    found = [k for k, (_, fatal) in kinds(cleaned(content, tmp_path)).items() if fatal]
    assert len(found) == 1 and "iscrowd" in found[0]


def test_copies_are_left_out(content, tmp_path):
    """Other ids and other key orders do not matter; a file that is used as it is, is refused."""
    copies = copy.deepcopy(content["annotations"])
    for number, annotation in enumerate(copies):
        annotation["id"] = 1000 + number
    content["annotations"] += [dict(reversed(a.items())) for a in copies]
    data = cleaned(content, tmp_path)
    assert len(data.content["annotations"]) == 20
    assert kinds(data) == {"objects that are listed twice": (20, False)}
    source = Source(tmp_path / "data.json", tmp_path / "images")
    assert [f.fatal for f in inspect_source(source) if "twice" in f.description] == [True]


def test_boxes_as_corners(content, tmp_path):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
        del annotation["segmentation"], annotation["area"]
    found = kinds(cleaned(content, tmp_path))
    assert found["boxes that look like x1, y1, x2, y2"] == (10, True)


def test_boxes_that_leave_the_image_a_little_are_clipped(content, tmp_path):
    content["annotations"][0]["bbox"] = [100, 50, 40, 30]
    del content["annotations"][0]["segmentation"]
    assert not any("x1" in kind for kind in kinds(cleaned(content, tmp_path)))


def test_polygons_without_points(content, tmp_path):
    """The boxes stay usable."""
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[]]
    data = cleaned(content, tmp_path)
    objects = data.content["annotations"]
    assert len(objects) == 20 and not any("segmentation" in a for a in objects)
    assert kinds(data) == {"polygons without points": (20, False)}


@pytest.mark.parametrize("nested", [False, True])
def test_points_as_pairs(nested, content, tmp_path):
    original = cleaned(content, tmp_path).content["annotations"]
    for annotation in content["annotations"]:
        (flat,) = annotation["segmentation"]
        pairs = [list(pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
        annotation["segmentation"] = [pairs] if nested else pairs
    data = cleaned(content, tmp_path)
    assert data.content["annotations"] == original
    assert kinds(data) == {"masks with points as pairs": (20, False)}


def test_areas_in_other_units(content, tmp_path):
    """COCO's sizes are in pixels; an area as a share of the image is computed anew."""
    expected = [a["area"] for a in content["annotations"]]
    for annotation in content["annotations"]:
        annotation["area"] /= 128 * 96
    data = cleaned(content, tmp_path)
    areas = [a["area"] for a in data.content["annotations"]]
    assert areas == pytest.approx(expected, rel=0.1)
    assert kinds(data) == {"areas that are not those of the masks": (20, False)}


@pytest.mark.parametrize(
    "name", ["images\\2.png", "images/2.png", "2.PNG", "deep/2.png", "e\u0301.png"]
)
def test_near_names_of_missing_images(name, content, tmp_path):
    """Other slashes, folders, case and Unicode forms: the existing file is named."""
    Image.new("RGB", (128, 96)).save(tmp_path / "images" / "\u00e9.png")
    content["images"][1]["file_name"] = name
    expected = "\u00e9.png" if "e" == name[0] else "2.png"
    (finding,) = [f for f in cleaned(content, tmp_path).findings if f.fatal]
    assert finding.examples[0].endswith(f"found as {expected}")
