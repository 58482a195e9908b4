"""Checkpoints: on the disk whole or not at all, and what training goes on from."""

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
    """Weight and iteration of a model that goes on from the folder."""
    model = layer(0.0)
    found = StrictCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    return model.weight.item(), found.get("iteration", -1)


def test_goes_on_from_the_newest(folder):
    assert resumed(folder) == (2.0, 19)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("last_checkpoint", "model_0000009.pth", "model_0000019.pth")
    ]
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    assert resumed(folder) == (1.0, 9), "as Detectron2 has it: the file decides"


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
    ids=["truncated", "a bit", "empty", "missing", "empty name", "half a name", "no name"],
)
def test_passes_over_what_is_damaged(folder, damage, expected, caplog):
    damage(folder)
    # Weights that are no checkpoint
    torch.save({"model": {"weight": torch.full((1, 1), 3.0)}}, folder / "model_other.pth")
    weight, iteration = resumed(folder)
    assert (weight, iteration) == ({9: 1.0, 19: 2.0}[expected], expected)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any(f"going on from {folder}/model_00000{expected:02}.pth" in line for line in told)


def test_starts_where_nothing_is_left(folder, caplog):
    for path in folder.glob("*.pth"):
        truncate(path)
    assert resumed(folder) == (0.0, -1)
    assert "there is no whole checkpoint beside it" in caplog.text


def test_failed_tag_leaves_what_was_there(folder, monkeypatch):
    """A disk that is full once the checkpoint is written: the one before is still named."""
    sync, calls = os.fsync, []

    def full_later(handle):
        calls.append(handle)
        # The checkpoint's, its folder's, and then the tag's
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full_later)
    with pytest.raises(OSError, match="No space left"):
        StrictCheckpointer(layer(4.0), str(folder)).save("model_0000029", iteration=29)
    assert (folder / "last_checkpoint").read_text() == "model_0000019.pth"
    assert resumed(folder) == (2.0, 19)


def test_failed_write_leaves_what_was_there(folder, monkeypatch):
    """A disk that is full in the middle of the file."""

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
    (folder / "model_0000004.pth.partial").write_bytes(b"left by a process that was killed")
    StrictCheckpointer(layer(3.0), str(folder), keep=2).save("model_0000029", iteration=29)
    left = {"model_0000019.pth", "model_0000029.pth", "model_final.pth", "last_checkpoint"}
    assert {path.name for path in folder.iterdir()} == left
    assert resumed(folder) == (3.0, 29)


def test_keeps_what_it_has_just_written(folder):
    """Beside checkpoints of later iterations, which are damaged or of another training."""
    StrictCheckpointer(layer(3.0), str(folder), keep=1).save("model_0000014", iteration=14)
    left = {"model_0000014.pth", "model_0000019.pth", "last_checkpoint"}
    assert {path.name for path in folder.iterdir()} == left
    assert resumed(folder) == (3.0, 14)


def test_a_bit_anywhere(folder):
    """It goes on from the damaged one as it was, or from the one before, and never stops."""
    path = folder / "model_0000019.pth"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 61):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert resumed(folder) in ((2.0, 19), (1.0, 9)), bit


def test_whatever_the_tag_holds(folder):
    for content in (b"", b"\xff\xfe", b"a\0b", b"model_0000099.pth", b"..", b"x" * 9999):
        (folder / "last_checkpoint").write_bytes(content)
        assert resumed(folder) == (2.0, 19), content


class Command:
    """Leaves a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl", "weights.pyth"])
def test_a_file_that_would_run_code_is_refused(name, tmp_path):
    content = {"model": layer(1.0).state_dict(), "more": Command(tmp_path / "it has run")}
    if name == "weights.pkl":
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match=f"{name} cannot be read as weights: it asks for"):
        StrictCheckpointer(layer(0.0)).load(str(tmp_path / name))
    assert not (tmp_path / "it has run").exists()


def test_a_disk_that_is_full_in_the_middle_is_told(folder):
    """By whatever it says, wherever PyTorch's archive is then."""

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
