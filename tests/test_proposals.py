"""Checks of files of precomputed proposals, which Detectron2 unpickles."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shapes_config
from detectron2.data import get_detection_dataset_dicts
from safetensors.torch import save_file

from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError


class CreatesFolder:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def proposals(*extra: object) -> dict:
    """Proposals for the images of `shapes_val`, in Detectron2's format."""
    records = get_detection_dataset_dicts("shapes_val", filter_empty=False)
    boxes = [np.array([[1, 2, 30, 40], [5, 5, 20, 20]], np.float32) for _ in records]
    scores = [np.array([0.5, 0.9], np.float32) for _ in records]
    ids = [record["image_id"] for record in records]
    return {"ids": ids, "boxes": boxes, "objectness_logits": scores, "extra": extra}


def check(path: object, *opts: str, eval_only: bool = True) -> None:
    opts = ("DATASETS.PROPOSAL_FILES_TEST", f"('{path}',)", *opts)
    cfg = shapes_config("mask_rcnn_R_18_FPN_gn", "MODEL.LOAD_PROPOSALS", "True", *opts)
    Trainer.check_inputs(cfg, eval_only)


def load(path: Path) -> list[dict]:
    """Load the dataset with proposals, as Detectron2 does."""
    return get_detection_dataset_dicts("shapes_val", filter_empty=False, proposal_files=[str(path)])


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_valid_proposals_are_accepted(protocol, tmp_path):
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps(proposals(), protocol))
    check(path)
    assert all(len(record["proposal_boxes"]) == 2 for record in load(path))


def hidden_in_zip(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive, archive.open("a.npy", "w") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize("name", ["proposals.pkl", "proposals.safetensors"])
@pytest.mark.parametrize("write", [Path.write_bytes, hidden_in_zip])
def test_code_is_refused(write, name, tmp_path):
    path, ran = tmp_path / name, tmp_path / "ran"
    write(path, pickle.dumps(proposals(CreatesFolder(ran)), 2))
    with pytest.raises(InputError, match=name):
        check(path)
    assert not ran.exists()
    load(path)
    assert ran.exists(), "Detectron2 runs the code"


def arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, boxes=np.zeros(2))


def tensors(path: Path) -> None:
    save_file({"boxes": torch.zeros(2)}, path)


@pytest.mark.parametrize("write", [arrays, tensors])
def test_other_formats_are_refused(write, tmp_path):
    """Such files could contain a pickle, too."""
    path = tmp_path / "proposals.pkl"
    write(path)
    with pytest.raises(InputError, match=r"proposals\.pkl"):
        check(path)


def test_training_checks_both_keys(tmp_path):
    """Evaluation checks PROPOSAL_FILES_TEST only."""
    good, bad = tmp_path / "good.pkl", tmp_path / "bad.pkl"
    good.write_bytes(pickle.dumps(proposals()))
    bad.write_bytes(pickle.dumps(CreatesFolder(tmp_path / "ran")))
    train = "DATASETS.PROPOSAL_FILES_TRAIN"
    check(good, train, f"('{bad}',)")
    check(good, train, f"('{good}',)", eval_only=False)
    for files in (f"('{bad}',)", "()", f"('{good}', '{good}')"):
        with pytest.raises(InputError, match=train):
            check(good, train, files, eval_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["none.pkl", ".", "https://host/x.pkl", "detectron2://x.pkl"])
def test_missing_and_remote_files_are_refused(name):
    with pytest.raises(InputError, match="PROPOSAL_FILES_TEST"):
        check(name)


def test_files_are_ignored_without_load_proposals(tmp_path):
    check(tmp_path / "none.pkl", "MODEL.LOAD_PROPOSALS", "False")
