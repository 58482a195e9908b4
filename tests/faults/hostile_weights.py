"""Generator of weight files that try to run code, crash the reader or exhaust memory."""

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

POINTER = b"\x10\x00\x00\x00\x00\x00\x00\x00"  # reading from this address crashes the process


def text(value: str) -> bytes:
    """The pickle instruction for a text."""
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def name(module: str, attribute: str) -> bytes:
    """The pickle instruction that looks up `module.attribute`."""
    return f"c{module}\n{attribute}\n".encode()


def literal(value: Any) -> bytes:
    """The pickle instructions for a plain value, without the protocol and end marks."""
    return pickle.dumps(value, protocol=2)[2:-1]


def weights(value: bytes) -> bytes:
    """A complete pickle of `{"model": {"weight": value}}`."""
    inner = b"}" + text("weight") + value + b"s"
    return b"\x80\x02}" + text("model") + inner + b"s."


def commands(canary: Path) -> list[bytes]:
    """Instructions that would each run code which creates `canary`."""
    shell = f"touch {canary}"
    system = name("os", "system")
    hidden = b"\x80\x04\x8c\x02os\x8c\x06system\x93"
    arguments = b"(" + text(shell) + b"t"
    return [
        system + arguments + b"R",
        hidden + arguments + b"R",
        system + arguments + b"\x81",
        system + arguments + b"}\x92",
        b"(" + system + text(shell) + b"o",
        b"(" + text(shell) + b"ios\nsystem\n",
        name("builtins", "eval") + b"(" + text(f"open({str(canary)!r}, 'w')") + b"tR",
        name("functools", "partial") + b"(" + system + text(shell) + b"tR)R",
        name("torch._utils", "_rebuild_parameter.__globals__") + b"(tR",
        name("numpy.core.multiarray", "_reconstruct") + b"(" + system + b"K\x00\x85C\x01btR",
        name("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + system
        + system
        + arguments
        + b"}tR",
        # Set attributes of the replacement values
        name("collections", "OrderedDict") + b")R}" + text("get") + system + b"sb",
        name("_codecs", "encode") + b"N}" + text("__defaults__") + arguments + b"s\x86b",
        name("collections", "OrderedDict") + b"N}" + text("__setstate__") + system + b"s\x86b",
    ]


def dtype(rng: random.Random) -> bytes:
    """A random dtype with a random state."""
    code = rng.choice(["O8", "O", "f4", "f8", "V8", "U1", "S0", "i8", "f4,O", "b1", "M8", "i3", ""])
    made = (
        name("numpy", "dtype") + b"(" + text(code) + rng.choice([b"K\x00K\x01", b"\x89\x88", b""])
    )
    made += b"tR"
    order = rng.choice(["|", "<", ">", "=", "!", "", 3])
    parts = [None, ("a",), {"a": 1}, (1, 2), "x"]
    sizes = [-1, 0, 8, 2**31, 2**62]
    state = (
        rng.choice([3, 4, 1, 0, -1, 2**40]),
        order,
        *(rng.choice([None, None, rng.choice(parts)]) for _ in range(3)),
        *(rng.choice(sizes) for _ in range(2)),
        rng.choice([0, 63, 1, 4, 27, -1, 2**33]),
    )
    state = state[: rng.choice([8, 8, 8, 9, 5, 2, 0])]
    if rng.random() < 0.2:
        state = (*state, {})
    return made + (literal(state) + b"b") * rng.choice([1, 1, 0, 2])


def scalar(rng: random.Random) -> bytes:
    """A NumPy scalar with a random dtype."""
    raw = rng.choice([POINTER, b"", b"\x00" * 4, b"\xff" * 16])
    module = rng.choice(["numpy.core.multiarray", "numpy._core.multiarray"])
    return name(module, "scalar") + b"(" + dtype(rng) + literal(raw) + b"tR"


def array(rng: random.Random) -> bytes:
    """A NumPy array whose dtype, shape and bytes may disagree."""
    module = rng.choice(["numpy.core.multiarray", "numpy._core.multiarray"])
    kind = rng.choice([name("numpy", "ndarray"), name("numpy", "dtype"), literal(3)])
    shape = rng.choice([(0,), (0,), (2**40,), (-1,), ()])
    made = name(module, "_reconstruct") + b"(" + kind + literal(shape) + b"C\x01btR"
    size = rng.choice([(1,), (2,), (2**40,), (-1,), (2**62, 0), (1,) * 70, "x", (True,), (1.0,)])
    fortran = rng.choice([False, True, 0, "x"])
    raw = rng.choice([POINTER, POINTER * 2, b"", [1, 2], "text"])
    state = b"(K\x01" + literal(size) + dtype(rng) + literal(fortran) + literal(raw) + b"t"
    return made + (state + b"b") * rng.choice([1, 1, 2])


def from_buffer(rng: random.Random) -> bytes:
    """The same in the form that pickle protocol 5 uses."""
    module = rng.choice(["numpy.core.numeric", "numpy._core.numeric"])
    shape = rng.choice([(1,), (2,), (2**40,), (-1,), (1, 1)])
    raw = literal(rng.choice([POINTER, b"", "text"]))
    order = literal(rng.choice(["C", "F", "Z", None]))
    return name(module, "_frombuffer") + b"(" + raw + dtype(rng) + literal(shape) + order + b"tR"


def colliding(number: int) -> bytes:
    """An integer; all of them have the same hash."""
    return b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little")


def bombs(rng: random.Random) -> bytes:
    """A few instructions that need a very long time or very much memory."""
    deep = rng.choice([30, 60, 400])
    return rng.choice(
        [
            b"K\x00r" + struct.pack("<I", rng.choice([2**20, 2**31, 2**32 - 1])),
            b"\x8e" + struct.pack("<Q", rng.choice([2**33, 2**40, 2**63])),
            b"\x8d" + struct.pack("<Q", rng.choice([2**33, 2**62])),
            b"\x8b" + struct.pack("<i", 2**31 - 1),
            b"}K\x00\x85" + b"2\x86" * deep + b"K\x01s",  # a key of 2 ** deep parts
            b"\x8f(K\x00\x85" + b"2\x86" * deep + b"\x90",
            b"(K\x00\x85" + b"2\x86" * deep + b"\x91",
            b"]" * 100_000,
            b"(" * 100_000,
            b"L" + b"9" * 50_000 + b"L\n",
            b"I" + b"9" * 50_000 + b"\n",
            b"U\x00" * 3 + b"\x95" + struct.pack("<Q", 2**62),
            b"}" + b"".join(colliding(n) + b"K\x00s" for n in range(5_000)),
            # The same million bytes 2000 times
            b"X"
            + struct.pack("<I", 10**6)
            + b"a" * 10**6
            + b"q\x00"
            + (name("_codecs", "encode") + b"(h\x00" + text("latin1") + b"tR") * 2000,
        ]
    )


def nest(rng: random.Random) -> bytes:
    """A dict that contains itself many times."""
    count = rng.choice([3, 300])
    keys = b"".join(text(f"k{i}") + b"h\x07" for i in range(count))
    return b"}q\x07(" + keys + b"u"


def pickled(rng: random.Random, canary: Path) -> bytes:
    """A complete hostile pickle."""
    kinds: list[Callable[[], bytes]] = [
        lambda: rng.choice(commands(canary)),
        lambda: scalar(rng),
        lambda: array(rng),
        lambda: from_buffer(rng),
        lambda: bombs(rng),
        lambda: nest(rng),
    ]
    content = weights(rng.choice(kinds)())
    if rng.random() < 0.2:
        place = rng.randrange(2, len(content))
        content = content[:place] + rng.randbytes(1) + content[place + 1 :]
    return content


def storage(rng: random.Random) -> bytes:
    """A tensor whose storage, size and strides may disagree."""
    kind = name("torch", rng.choice(["FloatStorage", "QInt8Storage", "UntypedStorage", "Tensor"]))
    key = rng.choice(["0", "1", "../0", "data.pkl", 0])
    count = rng.choice([4, 4, 0, -1, 3, 5, 2**28, 2**40, 2**62, 2**70, 4.0])
    place = b"(" + text("storage") + kind + literal(key) + text("cpu") + literal(count) + b"tQ"
    numbers = [0, 1, 2, 4, -1, 5, 2**40, 2**62, 2**64]
    sizes = [(4,), (2, 2), (2**40,), (2**31, 2**31), (-1,), (5,), (1,) * 70, (), "x", (1.5,)]
    strides = [(1,), (0,), (2, 1), (-1,), (2**40,), (0, 0), (1,) * 70, ()]
    function = rng.choice(["_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_tensor_v3"])
    more = b"\x89}" + b"".join(rng.choice([name("torch", "float32"), b"N", b"K\x01"]) for _ in "ab")
    arguments = literal(rng.choice(numbers)) + literal(rng.choice(sizes))
    arguments += literal(rng.choice(strides)) + more
    return name("torch._utils", function) + b"(" + place + arguments + b"tR"


def archive(content: bytes, rng: random.Random, path: Path) -> None:
    """Write a file in the format of `torch.save` with the given pickle."""
    packed = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(path, "w", packed) as file:
        file.writestr("w/data.pkl", content)
        file.writestr("w/byteorder", rng.choice(["little"] * 20 + ["big", "\xff"]))
        file.writestr("w/data/0", np.arange(4, dtype=np.float32).tobytes())
        if rng.random() < 0.1:
            file.writestr("w/data/1", bytes(2**26))


def legacy(content: bytes, rng: random.Random, path: Path) -> None:
    """The same in the format of PyTorch before 1.6."""
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer, _use_new_zipfile_serialization=False)
    intact = buffer.getvalue()
    start = intact.index(b"\x80\x02ctorch._utils")
    raw = np.arange(4, dtype=np.float32).tobytes()
    keys = pickle.dumps(rng.choice([["0"], [], ["0", "0"], [0], "0"]), protocol=2)
    count = struct.pack("<q", rng.choice([4, 4, 2**40, -1]))
    path.write_bytes(intact[:start] + content + keys + count + raw[: rng.choice([16, 16, 3])])


def arrays(rng: random.Random, path: Path) -> None:
    """Write an .npz file whose header and content may disagree."""
    shape = rng.choice(["(4,)", "(2**40,)", f"({2**40},)", "(-1,)", "(4", "()", "(4.0,)", "(0,)"])
    kind = rng.choice(["'<f4'", "'|O'", "'<f4,O'", "[('a', '|O')]", "'|V0'", "'|S0'", "'>f4'", "7"])
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}"
    header = rng.choice([header, header[:-3], "(" * 9000, "-" * 9000 + "1", "[" * 99, header * 2])
    version = rng.choice([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    raw = rng.choice([bytes(16), bytes(15), b"", bytes(2**26)])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("conv0/W.npy", b"\x93NUMPY" + version + length + header.encode() + raw)


def own_facts(rng: random.Random, path: Path) -> None:
    """Write a file of gn_det's own format with invalid records."""
    strange = [None, True, -1, 2**40, 10**30, "x" * 999, "a\nb", [], [1] * 9, {}, float("nan")]
    keys = ["MODEL.RESNETS.NORM", "MODEL.RESNETS.DEPTH", "MODEL.RESNETS.WIDTH_PER_GROUP"]
    keys += ["MODEL.PIXEL_MEAN", "INPUT.FORMAT", "MODEL.GROUP_NORM.NUM_GROUPS", "x"]
    facts = {rng.choice(keys): rng.choice([*strange, torch.ones(2)]) for _ in range(3)}
    content = {
        "model": {"stem.conv1.weight": torch.ones(4, 3, 7, 7)},
        "__author__": rng.choice([*strange, "gn_det"]),
        "gn_det": rng.choice([facts, facts, facts, *strange]),
    }
    torch.save(content, path)


def hostile_weights(rng: random.Random, folder: Path) -> Path:
    """Write a random hostile file.

    Args:
        rng: source of all random choices.
        folder: where to write; the file creates `folder / "canary"` if its code is run.

    Returns:
        path of the file.
    """
    path = folder / f"hostile{rng.choice(['.pth', '.pkl', '.pyth', '.npz', '.safetensors'])}"
    canary = folder / "canary"
    kind = rng.randrange(6)
    if kind == 0:
        path.write_bytes(pickled(rng, canary))
    elif kind == 1:
        archive(rng.choice([pickled(rng, canary), weights(storage(rng))]), rng, path)
    elif kind == 2:
        archive(weights(storage(rng)), rng, path)
    elif kind == 3:
        legacy(rng.choice([pickled(rng, canary), weights(storage(rng))]), rng, path)
    elif kind == 4:
        arrays(rng, path)
    else:
        own_facts(rng, path)
    return path
