"""Annotations that are valid JSON, but do not mean what COCO means; all through `clean`."""

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from gn_det.data.clean import Source, clean, clean_splits
from gn_det.data.inspect_source import inspect_source
from gn_det.errors import InputError


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


@pytest.mark.parametrize("field", ["id", "image_id", "category_id"])
def test_ids_as_text(field, content, tmp_path):
    """One finding of one kind, instead of a dangling reference."""
    entries = content["images"] if field == "id" else content["annotations"]
    for entry in entries:
        entry[field] = str(entry[field])
    found = kinds(cleaned(content, tmp_path))
    assert any("text" in kind and fatal for kind, (_, fatal) in found.items())


def test_files_with_several_pages(content, tmp_path):
    frames = [Image.new("RGB", (128, 96), (value, 0, 0)) for value in (10, 90)]
    for name in ("2.tif", "3.gif"):
        path = tmp_path / "images" / name
        frames[0].save(path, save_all=True, append_images=frames[1:])
        content["images"][int(name[0]) - 1]["file_name"] = name
    assert list(kinds(cleaned(content, tmp_path)).values()) == [(2, False)]


def name_versions(content: dict, folder: Path, originals: int) -> None:
    """Give the images the names of Roboflow's augmented copies."""
    for number, image in enumerate(content["images"]):
        name = f"img{number % originals}_png.rf.{number:032x}.png"
        (folder / "images" / image["file_name"]).rename(folder / "images" / name)
        image["file_name"] = name


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.6])
def test_versions_of_an_image_stay_together(fraction, content, tmp_path):
    name_versions(content, tmp_path, 5)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    try:
        sets = clean_splits(Source(path, tmp_path / "images"), None, val_fraction=fraction)[:2]
    except InputError:
        return  # all five are on one side
    one, two = ({e["file_name"][:4] for e in data.content["images"]} for data in sets)
    assert one and two and not one & two


def test_versions_of_an_image_in_both_sets(content, tmp_path):
    name_versions(content, tmp_path, 5)
    sources = []
    for half in (slice(0, 6), slice(6, 10)):
        images = content["images"][half]
        ids = {image["id"] for image in images}
        objects = [a for a in content["annotations"] if a["image_id"] in ids]
        path = tmp_path / f"{half.start}.json"
        path.write_text(json.dumps({**content, "images": images, "annotations": objects}))
        sources.append(Source(path, tmp_path / "images"))
    (finding,) = clean_splits(sources[0], sources[1])[2]["both"]
    # 0 to 5 against 6 to 9: versions of 1, 2, 3 and 4
    assert (finding.count, finding.fatal) == (4, False) and "versions" in finding.description
