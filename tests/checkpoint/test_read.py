"""Files of every format are read without running code from them."""

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from gn_det.checkpoint.read import read_weights
from gn_det.errors import InputError

STATE = {
    "conv1.weight": torch.arange(12.0).view(1, 3, 2, 2),
    "bn1.bias": torch.tensor([0.5], dtype=torch.float16),
}
ARRAYS = {name: tensor.numpy() for name, tensor in STATE.items()}

WRITERS = {
    "state.pth": lambda path: torch.save(STATE, path),
    "old.pth": lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    "trainer.pth.tar": lambda path: torch.save(
        {
            "state_dict": OrderedDict(STATE),
            "epoch": 3,
            "best": np.float64(76.1),
            "args": argparse.Namespace(lr=0.1),
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
        },
        path,
    ),
    "config_first.pth": lambda path: torch.save(
        {"model": {"depth": 50}, "state_dict": STATE, "score": torch.tensor(0.5)}, path
    ),
    "arrays.pth": lambda path: torch.save({"state_dict": ARRAYS, "loss": np.float16(2)}, path),
    "bytes.pkl": lambda path: path.write_bytes(
        pickle.dumps({name.encode(): array for name, array in ARRAYS.items()}, protocol=2)
    ),
    "by_content.bin": lambda path: save_file(STATE, path),
    "blobs.pkl": lambda path: path.write_bytes(pickle.dumps({"blobs": ARRAYS}, protocol=2)),
    "newest.pkl": lambda path: path.write_bytes(pickle.dumps(ARRAYS, protocol=5)),
    "ordered.pkl": lambda path: path.write_bytes(pickle.dumps(OrderedDict(ARRAYS))),
    "arrays.npz": lambda path: np.savez_compressed(path, **ARRAYS),
    "model.safetensors": lambda path: save_file(STATE, path),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", WRITERS)
def test_formats(name, device, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    tensors = read_weights(path, device).tensors
    assert tensors.keys() == STATE.keys()
    for key, tensor in STATE.items():
        assert tensors[key].device.type == device
        if device == "cpu":
            assert_close(tensors[key], tensor, rtol=0, atol=0)
        else:
            assert tensors[key].shape == tensor.shape


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def malicious_npz(evil: Malicious, path: Path) -> None:
    np.savez(path, **{"conv0/W": np.array([evil], dtype=object)})


EVIL = {
    "evil.pkl": lambda evil, path: path.write_bytes(pickle.dumps({"conv1_w": evil})),
    "nested.pkl": lambda evil, path: path.write_bytes(
        pickle.dumps({"blobs": {"conv1_w": np.array([evil], dtype=object)}})
    ),
    "evil.pth": lambda evil, path: torch.save({"model": evil}, path),
    "old.pth": lambda evil, path: torch.save(
        {"model": evil}, path, _use_new_zipfile_serialization=False
    ),
    "pickle.pth": lambda evil, path: path.write_bytes(pickle.dumps({"model": evil})),
    "evil.npz": malicious_npz,
    "evil.safetensors": lambda evil, path: path.write_bytes(pickle.dumps({"model": evil})),
}


@pytest.mark.parametrize("name", EVIL)
def test_no_code_is_run(name, tmp_path):
    path, touched = tmp_path / name, tmp_path / "touched"
    EVIL[name](Malicious(touched), path)
    with pytest.raises(InputError, match=f"{name} cannot be read as weights: ") as error:
        read_weights(path)
    assert "\n" not in str(error.value) and not touched.exists()
    if not name.endswith(("npz", "safetensors")) and name != "nested.pkl":
        assert "state_dict" in str(error.value)


def test_pickle_would_run_the_code(tmp_path):
    """Python's unpickler runs the code of these files."""
    path = tmp_path / "evil.pkl"
    EVIL["evil.pkl"](Malicious(tmp_path / "touched"), path)
    pickle.loads(path.read_bytes())
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not weights", pickle.dumps([1, 2])])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".npz", ".safetensors"])
def test_no_weights(suffix, content, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"broken{suffix} cannot be read as weights"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_what_a_failed_download_leaves(content, word, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"weights\.pth .*{word}"):
        read_weights(path)


def test_damaged_files(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", **ARRAYS)
    intact = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "bits.npz").write_bytes(intact[:90] + b"?????" + intact[95:])
    np.savez(tmp_path / "text.npz", text=np.array(["conv0/W"]))
    for name in ("cut.npz", "bits.npz", "text.npz"):
        with pytest.raises(InputError, match=f"{name} cannot be read as weights"):
            read_weights(tmp_path / name)


def test_several_networks_in_a_file(tmp_path):
    """Other networks are counted; without a usual key, the places become prefixes of names."""
    torch.save({"model": STATE, "model_ema": STATE, "steps": torch.tensor(3)}, tmp_path / "a.pth")
    file = read_weights(tmp_path / "a.pth")
    assert file.tensors.keys() == STATE.keys() and file.others == {"model_ema": 2, "": 1}
    torch.save({"student": STATE, "teacher": {"backbone": STATE}}, tmp_path / "b.pth")
    names = {f"{place}.{name}" for place in ("student", "teacher.backbone") for name in STATE}
    assert read_weights(tmp_path / "b.pth").tensors.keys() == names


def test_damage_that_pytorch_does_not_detect(tmp_path):
    """PyTorch checks no checksums, and does not say that a file is truncated."""
    path = tmp_path / "w.pth"
    torch.save(STATE, path)
    intact = path.read_bytes()
    place = intact.index(STATE["conv1.weight"].numpy().tobytes()[4:])
    path.write_bytes(intact[:place] + b"\xff" + intact[place + 1 :])
    with pytest.raises(InputError, match=r"w\.pth .*damaged"):
        read_weights(path)
    path.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(InputError, match=r"w\.pth .*truncated"):
        read_weights(path)


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {1: torch.ones(2)},
        {"model": {"args": {"depth": 50}}},
    ],
)
def test_unsupported_tensors(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth cannot be read as weights"):
        read_weights(tmp_path / "w.pth")


def test_no_advice_to_load_unsafely(tmp_path):
    """PyTorch's own error recommends weights_only=False."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("program.pth", "module.pth"):
        with pytest.raises(InputError, match=rf"{name} .*state_dict") as error:
            read_weights(tmp_path / name)
        assert "weights_only" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_weights(tmp_path / "absent.pth")
