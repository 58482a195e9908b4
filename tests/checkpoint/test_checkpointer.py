"""Checkpoints are written completely or not at all, and training resumes from an intact one."""

import errno
import io
import os
import pickle

import pytest
import torch
from torch import nn

from gn_det.checkpoint.checkpointer import StrictCheckpointer
from gn_det.checkpoint.save import save_content
from gn_det.errors import InputError


def layer(value: float) -> nn.Module:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of weight 1 at iteration 9 and weight 2 at iteration 19."""
    for value, iteration in ((1.0, 9), (2.0, 19)):
        name = f"model_{iteration:07}"
        StrictCheckpointer(layer(value), str(tmp_path)).save(name, iteration=iteration)
    return tmp_path


def resumed(folder) -> tuple[float, int]:
    """Weight and iteration of a model that resumes from the folder."""
    model = layer(0.0)
    checkpoint = StrictCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    return model.weight.item(), checkpoint.get("iteration", -1)


def test_resumes_from_the_newest(folder):
    assert resumed(folder) == (2.0, 19)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("last_checkpoint", "model_0000009.pth", "model_0000019.pth")
    ]
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    assert resumed(folder) == (1.0, 9), "last_checkpoint decides, as in Detectron2"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    at = content.index(torch.tensor(2.0).numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: truncate(folder / "model_0000019.pth"), 9),
        (lambda folder: change_a_byte(folder / "model_0000019.pth"), 9),
        (lambda folder: (folder / "model_0000019.pth").write_bytes(b""), 9),
        (lambda folder: (folder / "model_0000019.pth").unlink(), 9),
        (lambda folder: (folder / "last_checkpoint").write_text(""), 19),
        (lambda folder: (folder / "last_checkpoint").write_text("model_00000"), 19),
        (lambda folder: (folder / "last_checkpoint").unlink(), 19),
    ],
    ids=["truncated", "one bit", "empty", "missing", "empty tag", "partial name", "no tag"],
)
def test_skips_damaged_checkpoints(folder, damage, expected, caplog):
    damage(folder)
    # Weights without an iteration are not a checkpoint
    torch.save({"model": {"weight": torch.full((1, 1), 3.0)}}, folder / "model_other.pth")
    weight, iteration = resumed(folder)
    assert (weight, iteration) == ({9: 1.0, 19: 2.0}[expected], expected)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any(w.endswith(f"{folder}/model_00000{expected:02}.pth") for w in warnings)


def test_starts_anew_without_an_intact_checkpoint(folder, caplog):
    for path in folder.glob("*.pth"):
        truncate(path)
    assert resumed(folder) == (0.0, -1)
    assert f"{folder}/model_0000019.pth is missing or damaged: {folder} " in caplog.text


def test_failed_tag_leaves_the_old_one(folder, monkeypatch):
    """If the disk is full after the checkpoint, `last_checkpoint` names the previous one."""
    sync, calls = os.fsync, []

    def full_later(handle):
        calls.append(handle)
        # Calls for the checkpoint, its folder, and then the tag
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full_later)
    with pytest.raises(OSError, match="No space left"):
        StrictCheckpointer(layer(4.0), str(folder)).save("model_0000029", iteration=29)
    assert (folder / "last_checkpoint").read_text() == "model_0000019.pth"
    assert resumed(folder) == (2.0, 19)


def test_failed_write_leaves_old_files(folder, monkeypatch):
    """The disk is full while the checkpoint is written."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    for name in ("model_0000029", "model_0000019"):
        with pytest.raises(OSError, match="No space left"):
            StrictCheckpointer(layer(4.0), str(folder)).save(name, iteration=29)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_keeps_the_newest(folder):
    StrictCheckpointer(layer(0.5), str(folder)).save("model_final", iteration=29)
    StrictCheckpointer(layer(3.0), str(folder), keep=2).save("model_0000029", iteration=29)
    left = {"model_0000019.pth", "model_0000029.pth", "model_final.pth", "last_checkpoint"}
    assert {path.name for path in folder.iterdir()} == left
    assert resumed(folder) == (3.0, 29)


def test_keeps_the_checkpoint_just_written(folder):
    """Checkpoints of later iterations are damaged or belong to another training run."""
    StrictCheckpointer(layer(3.0), str(folder), keep=1).save("model_0000014", iteration=14)
    left = {"model_0000014.pth", "model_0000019.pth", "last_checkpoint"}
    assert {path.name for path in folder.iterdir()} == left
    assert resumed(folder) == (3.0, 14)


def test_one_flipped_bit_anywhere(folder):
    """Training resumes with the correct weights or from the previous checkpoint."""
    path = folder / "model_0000019.pth"
    intact = path.read_bytes()
    for bit in range(0, 8 * len(intact), 61):
        content = bytearray(intact)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert resumed(folder) in ((2.0, 19), (1.0, 9)), bit


def test_invalid_tags(folder):
    for content in (b"", b"\xff\xfe", b"a\0b", b"model_0000099.pth", b"..", b"x" * 9999):
        (folder / "last_checkpoint").write_bytes(content)
        assert resumed(folder) == (2.0, 19), content


class Command:
    """Creates a folder when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl", "weights.pyth"])
def test_a_file_that_would_run_code_is_rejected(name, tmp_path):
    content = {"model": layer(1.0).state_dict(), "more": Command(tmp_path / "it has run")}
    if name == "weights.pkl":
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} .*(mkdir|_rebuild_tensor_v2).*state_dict"):
        StrictCheckpointer(layer(0.0)).load(str(tmp_path / name))
    assert not (tmp_path / "it has run").exists()


def test_full_disk_raises_the_original_error(folder):
    """`save_content` raises the disk's error at any position in PyTorch's archive."""

    class Disk(io.BytesIO):
        def __init__(self, room: int) -> None:
            super().__init__()
            self.room = room

        def write(self, content) -> int:
            if self.tell() + len(content) > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    size = (folder / "model_0000019.pth").stat().st_size
    for room in range(0, size - 1, 97):
        with pytest.raises(OSError, match="No space left"):
            save_content({"model": layer(1.0).state_dict(), "iteration": 19}, Disk(room))
