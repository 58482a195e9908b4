"""Annotation files that cannot be trained on stop a run before it starts."""

import json

import pytest
from detectron2.data.datasets import register_coco_instances

from gn_det.data import check_dataset
from gn_det.errors import InputError

GOOD = {"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": [{"id": 1}]}
BROKEN = {
    "missing": (None, "cannot read .*No such file"),
    "text": ("images:", "is not JSON"),
    "list": ("[]", "holds no images"),
    "no_images": (json.dumps({**GOOD, "images": []}), "holds no images"),
    "no_annotations": (json.dumps({**GOOD, "annotations": []}), "holds no annotations"),
    "no_categories": (json.dumps({**GOOD, "categories": []}), "holds no categories"),
}


@pytest.mark.parametrize("classes", [1, None])
def test_good(classes, tmp_path):
    """So that each of the broken ones is refused for its own fault."""
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(GOOD))
    register_coco_instances(f"good_{classes}", {}, str(path), str(tmp_path))
    check_dataset(f"good_{classes}", classes)
    with pytest.raises(InputError, match=r"MODEL.ROI_HEADS.NUM_CLASSES"):
        check_dataset(f"good_{classes}", 2)


def test_not_registered():
    with pytest.raises(InputError, match="no data set is registered as shapes_test"):
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
    with pytest.raises(InputError, match=r"6 categories, but MODEL.ROI_HEADS.NUM_CLASSES is 80"):
        check_dataset("shapes_train", 80)


def test_a_test_set_needs_no_annotations(tmp_path):
    """As COCO's test-dev, which Detectron2 evaluates into a results file."""
    path = tmp_path / "image_info.json"
    path.write_text(json.dumps({key: GOOD[key] for key in ("images", "categories")}))
    register_coco_instances("test_dev", {}, str(path), str(tmp_path))
    check_dataset("test_dev", 1, annotated=False)
    with pytest.raises(InputError, match="holds no annotations"):
        check_dataset("test_dev", 1)
