"""Image and annotation files that are not regular files, damaged, or of unsupported formats."""

import io
import json
import os
import random
import socket
import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from child import limit_memory, run_in_child
from detectron2.data import detection_utils
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from gn_det.data import check_dataset
from gn_det.data.annotations import read_instances
from gn_det.data.clean import Source, clean
from gn_det.data.crops import write_crops
from gn_det.data.image_files import examine, read_image
from gn_det.data.image_folder import ImageMapper, build_test_loader
from gn_det.data.image_reader import FORMATS
from gn_det.data.inspect_source import inspect_source
from gn_det.data.prepare import is_prepared
from gn_det.data.split import split
from gn_det.data.unlabelled_images import find_images
from gn_det.errors import InputError, printable

KINDS = ["fifo", "socket", "folder", "/dev/zero", "loop", "huge", "/proc"]


def make(kind: str, path: Path) -> Path:
    """Create a path that is not a readable regular file."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        # Socket paths have a length limit, so use a relative one
        with socket.socket(socket.AF_UNIX) as server:
            before = os.getcwd()
            os.chdir(path.parent)
            try:
                server.bind(path.name)
            finally:
                os.chdir(before)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**43)
    else:
        targets = {"loop": str(path), "/proc": "/proc/self/status"}
        path.symlink_to(targets.get(kind, kind))
    return path


def instances(folder: Path, file_name: str = "a.png") -> Source:
    """Write annotations of one image of 40 x 30 pixels; the image itself is not written."""
    images = [{"id": 1, "file_name": file_name, "width": 40, "height": 30}]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 9, 9]}
    annotation |= {"area": 81, "iscrowd": 0}
    content = {"images": images, "annotations": [annotation]}
    content["categories"] = [{"id": 1, "name": "nut"}]
    (folder / "a.json").write_text(json.dumps(content))
    return Source(folder / "a.json", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_not_regular_files(kind, tmp_path):
    """They are reported without blocking, by every function that reads images."""
    path = make(kind, tmp_path / "a.png")
    assert examine(path).error
    source = instances(tmp_path)
    for findings in (clean(source).findings, inspect_source(source)):
        assert any(f.fatal and "a.png" in str(f) for f in findings)
    with pytest.raises(InputError, match=r"a\.png"):
        read_image(path)
    with pytest.raises(InputError, match=r"a\.png"):
        write_crops(source.annotations, tmp_path, tmp_path / "crops")


@pytest.mark.parametrize("kind", KINDS)
def test_annotations_that_are_not_regular_files(kind, tmp_path):
    path = make(kind, tmp_path / "a.json")
    with pytest.raises(InputError, match=r"a\.json"):
        read_instances(path)
    assert not is_prepared(path)
    name = f"no_file_{kind}"
    register_coco_instances(name, {}, str(path), str(tmp_path))
    with pytest.raises(InputError, match=r"a\.json"):
        check_dataset(name)


def test_images_for_prediction_that_are_not_regular_files(tmp_path):
    (path,) = find_images([make("fifo", tmp_path / "a.png")])
    with pytest.raises(InputError, match=r"a\.png"):
        read_image(path)
    with pytest.raises(InputError):
        find_images([tmp_path / "none", path])


def test_image_folder_with_a_file_that_is_not_regular(tmp_path):
    from test_image_folder import config

    (tmp_path / "cat").mkdir()
    make("fifo", tmp_path / "cat" / "a.png")
    with pytest.raises(InputError, match=r"cat/a\.png"):
        next(iter(build_test_loader(config("SOLVER.IMS_PER_BATCH", 1), str(tmp_path))))


@pytest.mark.parametrize("length", [300, 5000])
def test_too_long_file_names(length, tmp_path):
    source = instances(tmp_path, "x" * length)
    for findings in (clean(source).findings, inspect_source(source)):
        assert [f.fatal for f in findings if "xxx" in str(f)] == [True]
        assert all(len(str(f)) < 1000 for f in findings)


def saved(kind: str, **options) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_supported_formats(kind, tmp_path):
    """The content selects the format, not the suffix, and pixels equal Detectron2's."""
    path = tmp_path / "a.png"
    path.write_bytes(saved(kind))
    assert np.array_equal(read_image(path), detection_utils.read_image(str(path), "RGB"))
    assert not any(f.fatal for f in inspect_source(instances(tmp_path)))
    assert not any(f.fatal for f in clean(instances(tmp_path)).findings)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "AVIF", "PDF", "SVG"])
def test_other_formats_are_rejected(kind, tmp_path, monkeypatch):
    """Also those that Detectron2 can read; Ghostscript is never started."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec cat > /dev/null\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    content = {"AVIF": b"\0\0\0\x1cftypavif\0\0\0\0mif1avif", "SVG": b"<svg/>"}
    path = tmp_path / "a.png"
    path.write_bytes(content.get(kind) or saved(kind))
    for findings in (clean(instances(tmp_path)).findings, inspect_source(instances(tmp_path))):
        assert any(f.fatal and "a.png" in str(f) for f in findings)
    with pytest.raises(InputError, match=r"a\.png"):
        read_image(path)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_with_an_invalid_tag(kind, tmp_path):
    """The orientation is applied, as in Detectron2, and the invalid tag is ignored."""
    # Two entries: orientation 6, and a numeric tag stored as text
    tags = b"II*\0\x08\0\0\0\x02\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    tags += b"\x9a\x82\x02\0\x04\0\0\0abc\0" + b"\0\0\0\0"
    path = tmp_path / "a.png"
    path.write_bytes(saved(kind, exif=Image.Exif() if kind == "TIFF" else b"Exif\0\0" + tags))
    if kind == "TIFF":
        path.write_bytes(saved(kind, tiffinfo={0x0112: 6, 0x829A: 0.5}))
    image = read_image(path)
    assert image.shape == (40, 30, 3)
    if kind != "TIFF":  # Detectron2 rotates TIFF images twice
        assert np.array_equal(image, detection_utils.read_image(str(path), "RGB"))


def test_damaged_images(tmp_path):
    """Each gives an image or a one-sentence error, in bounded time and memory."""
    run_in_child(__file__, "damaged", tmp_path / "a.png", seconds=300)


def check_damaged(path: Path) -> None:
    from hostile_annotations import SUPPORTED, damage, small_image

    limit_memory(6)
    warnings.simplefilter("ignore")
    for kind in SUPPORTED:
        read = 0
        for seed in range(300):
            rng = random.Random(f"{kind} {seed}")
            path.write_bytes(damage(small_image(rng, kind), rng))
            try:
                read += read_image(path).ndim == 3
            except InputError as error:
                assert str(error).isprintable() and str(path) in str(error)
        assert 10 < read < 290, kind


def check_hostile(folder: Path) -> None:
    from hostile_annotations import hostile_image

    limit_memory(6)
    warnings.simplefilter("ignore")
    for seed in range(300):
        path = hostile_image(random.Random(seed), folder)
        try:
            read_image(path)
        except InputError as error:
            assert str(error).isprintable() and str(path) in str(error)


def test_hostile_images(tmp_path):
    run_in_child(__file__, "hostile", tmp_path, seconds=200)


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_images_of_extreme_aspect_ratio(size, tmp_path):
    """Resized to a shorter side of 256 pixels, they would take gigabytes."""
    from test_image_folder import config

    Image.new("L", size).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png"):
        ImageMapper(config(), is_train=False)((str(tmp_path / "a.png"), 0))
    source = instances(tmp_path)
    assert any(f.fatal and "a.png" in str(f) for f in clean(source).findings)
    content = json.loads(source.annotations.read_text())
    content["images"][0] |= dict(zip(("width", "height"), size, strict=True))
    source.annotations.write_text(json.dumps(content))
    assert any(f.fatal and "a.png" in str(f) for f in inspect_source(source))


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (0, 5), (-40, -30), (10**400, 1)])
def test_impossible_listed_sizes(size, tmp_path):
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    source = instances(tmp_path)
    content = json.loads(source.annotations.read_text())
    content["images"][0] |= dict(zip(("width", "height"), size, strict=True))
    source.annotations.write_text(json.dumps(content))
    for findings in (clean(source).findings, inspect_source(source)):
        assert any(f.fatal and "a.png" in str(f) for f in findings)


TEXTS = {
    "a huge number": '{"images": [{"id": 1' + "0" * 5000 + "}]}",
    "nested lists": '{"images": ' + "[" * 10_000_000,
    "closed nested lists": '{"images": [], "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "half a character": '{"images": "\xff',
    "a byte of 0": "\0" * 1000,
}


@pytest.mark.parametrize("case", TEXTS)
def test_unreadable_json(case, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(TEXTS[case].encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.json") as error:
        read_instances(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["a\nerror: forged", "\x1b[2Jgone", "\u202egnp.exe", "\ud800"])
def test_control_characters_in_names_are_escaped(text, tmp_path):
    """Names of files and ids can neither forge lines nor control the terminal."""
    source = instances(tmp_path, text if text != "\ud800" else "a.png")
    content = json.loads(source.annotations.read_text())
    content["annotations"][0]["id"] = text
    content["annotations"][0]["bbox"] = text
    source.annotations.write_text(json.dumps(content))
    findings = [*clean(source).findings, *inspect_source(source)]
    assert findings and all(str(finding).isprintable() for finding in findings)


def test_printable():
    assert printable("é ok 日本") == "é ok 日本"
    assert printable("\x1b[0m\n\ud800") == r"\x1b[0m\n\ud800"
    assert len(printable("x" * 10**6)) == 200
    deep: list = []
    for _ in range(10**5):
        deep = [deep]
    assert len(printable(deep)) < 100
    while deep:  # so that Python does not free it recursively
        deep = deep.pop()


def test_long_chain_of_groups_that_share_files():
    """The time does not grow with the square of the chain's length."""
    count = 30_000
    entries = [{"file_name": str(i), "group": f"{(i + 1) // 2:06}"} for i in range(count)]
    digests = [str(i // 2) for i in range(count)]
    entries += [{"file_name": "alone", "group": str(i)} for i in range(100)]
    digests += map(str, range(-100, 0))
    start = time.process_time()
    chosen = split(entries[::-1], digests[::-1], 0.5, "group")
    assert time.process_time() - start < 5
    assert len({*chosen[100:]}) == 1


def test_group_name_that_utf_8_cannot_encode():
    entries = [{"file_name": str(i), "group": f"\ud800{i}"} for i in range(40)]
    assert len({*split(entries, [str(i) for i in range(40)], 0.5, "group")}) == 2


if __name__ == "__main__":
    {"hostile": check_hostile, "damaged": check_damaged}[sys.argv[1]](Path(sys.argv[2]))


def random_exif(rng: np.random.Generator, pixels: bytes) -> bytes:
    """A JPEG with random EXIF tags, most of them invalid, and an orientation."""
    entries = [
        struct.pack("<HHII", *(int(rng.integers(1 << bits)) for bits in (16, 4, 6, 32)))
        for _ in range(6)
    ]
    entries.append(struct.pack("<HHII", 0x0112, 3, 1, int(rng.integers(1, 9))))
    body = (
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(sorted(entries)) + b"\0" * 4
    )
    segment = b"Exif\0\0" + body + rng.bytes(40)
    return pixels[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + pixels[2:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_exif(tmp_path):
    """Whatever Detectron2 reads is read in the same way, as are tags that Pillow cannot write."""
    rng, path, read = np.random.default_rng(3), tmp_path / "a.jpg", 0
    plain = saved("JPEG")
    for _ in range(300):
        path.write_bytes(random_exif(rng, plain))
        image = read_image(path)
        try:
            expected = detection_utils.read_image(str(path), "RGB")
        except Exception:
            continue
        assert np.array_equal(image, expected)
        read += 1
    assert read > 100
