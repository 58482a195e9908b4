"""`check_dataset`: unusable annotation files abort a run before it starts."""

import json

import pytest
from detectron2.data.datasets import register_coco_instances

from gn_det.data import check_dataset
from gn_det.errors import InputError

GOOD = {"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": [{"id": 1}]}
BROKEN = {
    "missing": (None, "No such file"),
    "text": ("images:", "JSON"),
    "list": ("[]", " images"),
    "no_images": (json.dumps({**GOOD, "images": []}), " images"),
    "no_annotations": (json.dumps({**GOOD, "annotations": []}), " annotations"),
    "no_categories": (json.dumps({**GOOD, "categories": []}), " categories"),
}


@pytest.mark.parametrize("classes", [1, None])
def test_good(classes, tmp_path):
    """The intact file passes, so each broken file below is rejected for its own error."""
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(GOOD))
    register_coco_instances(f"good_{classes}", {}, str(path), str(tmp_path))
    check_dataset(f"good_{classes}", classes)
    with pytest.raises(InputError, match=r"MODEL.ROI_HEADS.NUM_CLASSES"):
        check_dataset(f"good_{classes}", 2)


def test_not_registered():
    with pytest.raises(InputError, match=r"shapes_test.*DATASETS\.TRAIN"):
        check_dataset("shapes_test", 6)


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case, tmp_path):
    text, message = BROKEN[case]
    path = tmp_path / "instances.json"
    if text is not None:
        path.write_text(text)
    register_coco_instances(f"broken_{case}", {}, str(path), str(tmp_path))
    with pytest.raises(InputError, match=rf"broken_{case}.*{path}.*") as error:
        check_dataset(f"broken_{case}", 6)
    assert error.match(message)


def test_wrong_number_of_classes():
    with pytest.raises(InputError, match=r"shapes_train has 6 .*ROI_HEADS\.NUM_CLASSES is 80"):
        check_dataset("shapes_train", 80)


def test_annotations_are_optional_for_a_test_set(tmp_path):
    """COCO's test-dev has none; Detectron2 writes a results file for it."""
    path = tmp_path / "image_info.json"
    path.write_text(json.dumps({key: GOOD[key] for key in ("images", "categories")}))
    register_coco_instances("test_dev", {}, str(path), str(tmp_path))
    check_dataset("test_dev", 1, annotated=False)
    with pytest.raises(InputError, match=r"test_dev: .* annotations"):
        check_dataset("test_dev", 1)
