"""Files of weights that try to run code, crash the reader or exhaust memory."""

import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gn_det.checkpoint.checkpointer import StrictCheckpointer
from gn_det.checkpoint.facts import describe_file
from gn_det.checkpoint.read import read_content, read_weights
from gn_det.errors import InputError


def rejected(path: Path, device: str = "cpu") -> str:
    """The message of the `InputError` for a file; it names the file and has one line."""
    with pytest.raises(InputError, match=path.name) as error:
        read_weights(path, device)
    assert "\n" not in str(error.value)
    return str(error.value)


def archive(path: Path, content: bytes, records: dict[str, bytes], packed=zipfile.ZIP_STORED):
    """Write a file in the format of `torch.save` with the given pickle and records."""
    with zipfile.ZipFile(path, "w", packed) as file:
        file.writestr("w/data.pkl", content)
        for key, record in records.items():
            file.writestr(f"w/data/{key}", record)


def repickled(path: Path, old: bytes, new: bytes) -> None:
    """Replace some bytes of the pickle in a file of `torch.save`."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            if name.endswith("data.pkl"):
                assert content.count(old) == 1
                content = content.replace(old, new)
            file.writestr(name, content)


# A scalar with an object dtype whose flags are cleared. NumPy would use eight bytes of the file as
# a pointer
POINTER = (
    b"\x80\x02}X\x01\x00\x00\x00w"
    b"cnumpy.core.multiarray\nscalar\n"
    b"(cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tR"
    b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"C\x08\x10\x00\x00\x00\x00\x00\x00\x00tRs."
)


def test_bytes_of_the_file_are_not_used_as_pointers(tmp_path):
    (tmp_path / "w.pkl").write_bytes(POINTER)
    archive(tmp_path / "w.pth", POINTER, {})
    for name in ("w.pkl", "w.pth"):
        assert "array" in rejected(tmp_path / name)


@pytest.mark.parametrize("code", ["O8", "O", "V8", "U1", "M8", "f4,O", "i3", "(2,)f4", ""])
def test_non_numeric_dtypes_are_rejected(code, tmp_path):
    dtype = b"cnumpy\ndtype\n(X" + struct.pack("<I", len(code)) + code.encode() + b"K\x00K\x01tR"
    content = b"\x80\x02cnumpy.core.multiarray\nscalar\n(" + dtype + b"C\x08" + bytes(8) + b"tR."
    (tmp_path / "w.pkl").write_bytes(content)
    rejected(tmp_path / "w.pkl")


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64),
]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_tensors_as_torch_load(dtype, new, tmp_path):
    """Bit-identical, with the same strides and offsets, also for shared storages."""
    if dtype == torch.float8_e4m3fn and not new:
        pytest.skip("PyTorch's legacy format does not support float8")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator).mul(9).to(dtype)
    content = {
        "contiguous": base,
        "view": base[2:5, 1::2],
        "transposed": base.t(),
        "empty": base[:0],
        "scalar": base[3, 3],
        "parameter": torch.nn.Parameter(base.clone(), requires_grad=False),
        "expanded": base[:1].expand(4, 8),
    }
    torch.save(
        {"model": OrderedDict(content)}, tmp_path / "w.pth", _use_new_zipfile_serialization=new
    )
    expected = torch.load(tmp_path / "w.pth", weights_only=True)["model"]
    for device in ("cpu", "meta"):
        actual = read_content(tmp_path / "w.pth", device)["model"]
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape
            assert actual[name].stride() == tensor.stride() or not tensor.numel()
            if device == "cpu":
                raw = [
                    t.contiguous().view(torch.uint8) if t.dim() else t
                    for t in (actual[name], tensor)
                ]
                assert torch.equal(*raw), name


@pytest.mark.parametrize("protocol", range(6))
def test_same_values_as_pickle(protocol, tmp_path):
    values = np.arange(24).reshape(4, 6)
    content = {
        "arrays": [values.astype(kind) for kind in ("<f4", ">f4", "<i8", ">u2", "?", "<c8", "<f2")],
        "fortran": np.asfortranarray(values.astype("f8")),
        "strided": values[::2, ::3].astype("f4"),
        "empty": values[:0].astype("f4"),
        "scalar": np.float32(0.1),
        "plain": [None, True, -1, 2**40, -(2**70), 0.1, "ä\n", b"\x00\xff", (1,), {1, 2}, 1 + 2j],
    }
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    actual = read_content(tmp_path / "w.pkl")
    assert actual["plain"] == content["plain"] and actual["scalar"] == content["scalar"]
    for one, two in zip(actual["arrays"], content["arrays"], strict=True):
        assert one.dtype == two.dtype.newbyteorder("=")
        np.testing.assert_array_equal(one, two)
    for name in ("fortran", "strided", "empty"):
        np.testing.assert_array_equal(actual[name], content[name])


def test_pickles_of_python_2(tmp_path):
    """Their text can hold any bytes, quoted or with a length."""
    raw = np.array([1.5, -2], "<f4").tobytes()
    head = b"}S'conv1_w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    text = "".join(f"\\x{byte:02x}" for byte in raw).encode()
    for quoted in (b"S'" + text + b"'\n", b"U\x08" + raw):
        state = b"(I1\n(I2\nt" + dtype + b"I00\n" + quoted + b"tb"
        (tmp_path / "w.pkl").write_bytes(head + state + b"s.")
        (tensor,) = read_weights(tmp_path / "w.pkl").tensors.values()
        assert_close(tensor, torch.tensor([1.5, -2.0]), rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x0ct", b"J\x00\x00\x00\x10t"),  # number of elements
        (b"K\x0ct", b"J\xff\xff\xff\xfft"),
        (b"K\x00K\x03K\x04\x86", b"K\x01K\x03K\x04\x86"),  # offset
        (b"K\x03K\x04\x86", b"K\x03K\x05\x86"),  # size
        (b"K\x03K\x04\x86", b"K\x03J\xff\xff\xff\xff\x86"),
        (b"K\x04K\x01\x86", b"K\x05K\x01\x86"),  # strides
        (b"K\x04K\x01\x86", b"J\xfc\xff\xff\xffK\x01\x86"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"),  # name of the record
    ],
)
def test_tensors_outside_their_storages_are_rejected(old, new, device, tmp_path):
    torch.save({"w": torch.ones(3, 4)}, tmp_path / "w.pth")
    repickled(tmp_path / "w.pth", old, new)
    rejected(tmp_path / "w.pth", device)


def compressed_npz(path: Path) -> None:
    np.savez_compressed(path, **{"conv0/W": np.zeros(2**27, np.uint8)})


def compressed_archive(path: Path) -> None:
    torch.save({"w": torch.zeros(2**25)}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)


def lying_header(path: Path) -> None:
    """250 MB of zeros, deflated, of which the headers say that they are 64 bytes."""
    size, lie = 250_123_457, 64
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("w/data.pkl", bytes(size))
    content = path.read_bytes()
    assert content.count(struct.pack("<I", size)) == 2
    path.write_bytes(content.replace(struct.pack("<I", size), struct.pack("<I", lie)))


def other_compression(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("w/data.pkl", bytes(2**20))


def huge_view(path: Path) -> None:
    torch.save({"w": torch.ones(3, 4)}, path)
    repickled(path, b"K\x04K\x01\x86", b"K\x00K\x00\x86")
    repickled(path, b"K\x03K\x04\x86", b"\x8a\x06" + bytes(5) + b"\x01K\x04\x86")


def one_array_many_times(path: Path) -> None:
    array = np.ones(2**20, np.float32)
    part = b"h\x00cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR\x8a\x03\x00\x00\x10\x85X\x01\x00\x00\x00CtR"
    raw = b"B" + struct.pack("<I", array.nbytes) + array.tobytes() + b"q\x00"
    calls = (b"cnumpy.core.numeric\n_frombuffer\n(" + part) * 300
    path.write_bytes(b"\x80\x04(" + raw + calls + b"l.")


def long_key(path: Path) -> None:
    """A dict key whose hash takes 2 ** 60 steps."""
    path.write_bytes(b"\x80\x02}K\x00\x85" + b"2\x86" * 60 + b"K\x01s.")


def far_memo(path: Path) -> None:
    """A memo index for which Python's unpickler allocates a table of 64 GB."""
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")


def in_itself(path: Path) -> None:
    """A dict that contains itself 400 times."""
    content = {f"k{i}": {} for i in range(400)}
    for key in content:
        content[key] = content
    path.write_bytes(pickle.dumps(content))


BOMBS = {
    "zeros.npz": compressed_npz,
    "deflated.pth": compressed_archive,
    "lying.pth": lying_header,
    "lzma.pth": other_compression,
    "view.pth": huge_view,
    "again.pkl": one_array_many_times,
    "key.pkl": long_key,
    "memo.pkl": far_memo,
    "itself.pkl": in_itself,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", BOMBS)
def test_files_that_would_exhaust_memory_or_time_are_rejected(name, device, tmp_path):
    path = tmp_path / name
    BOMBS[name](path)
    tracemalloc.start()
    try:
        rejected(path, device)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f4', 'shape': (4,", "(" * 9000, "-" * 9000 + "1", "{'descr': '|O'}", "[" * 99],
)
def test_invalid_npy_headers(header, tmp_path):
    raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(16)
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as file:
        file.writestr("w.npy", raw)
    rejected(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.NORM", torch.ones(2)),
        ("MODEL.RESNETS.DEPTH", "x" * 10**6),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", 2**40),
        ("MODEL.PIXEL_MEAN", [1.0, float("nan"), 3.0]),
        ("MODEL.GROUP_NORM.NUM_GROUPS", None),
    ],
)
def test_invalid_records_of_gn_det(key, value, tmp_path):
    content = {"model": {"stem.conv1.weight": torch.ones(1)}, "gn_det": {key: value}}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"w\.pth.*{key}") as error:
        describe_file(tmp_path / "w.pth")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a" * 10_000])
def test_names_are_printed_without_control_characters(name, tmp_path):
    torch.save({"model": {name: torch.ones(1)}}, tmp_path / "w.pth")
    assert rejected(tmp_path / "w.pth").isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", Path("/dev/zero"), tmp_path):
        rejected(path)


def test_a_state_dict_keeps_its_versions(tmp_path):
    """Layers use them to recognise files of older PyTorch versions."""
    model = torch.nn.BatchNorm2d(2)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    state = read_content(tmp_path / "w.pth")["model"]
    assert state._metadata == model.state_dict()._metadata
    StrictCheckpointer(model, complete=True).load(str(tmp_path / "w.pth"))
