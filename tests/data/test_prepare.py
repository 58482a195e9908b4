"""Custom datasets: findings, automatic fixes, and the prepared copies that training uses."""

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, detection_utils
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from gn_det.config_file import read_config
from gn_det.data.clean import Source, clean_splits
from gn_det.data.findings import Findings
from gn_det.data.image_files import read_image
from gn_det.data.inspect_source import inspect_source
from gn_det.data.masks import clean_mask
from gn_det.data.prepare import Prepared, keys_of, prepare, register
from gn_det.data.split import split
from gn_det.errors import InputError

SIZE = (40, 30)  # width, height
SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


def make(folder: Path, name: str, first: int = 1) -> Source:
    """Write a dataset of three images with one object each, and two categories with ids 7 and 3."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(first)
    content: dict = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number in range(first, first + 3):
        file_name = f"{number}.png"
        pixels = noise.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / file_name)
        size = {"width": SIZE[0], "height": SIZE[1]}
        content["images"].append({"id": number, "file_name": file_name, **size})
        keys = {"image_id": number, "category_id": 7, "bbox": [10, 10, 10, 10]}
        content["annotations"].append({"id": number, "segmentation": SQUARE, **keys})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return Source(path, folder / "images")


CATEGORIES = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]


@pytest.fixture
def data(tmp_path) -> tuple[Source, Source]:
    return make(tmp_path, "train"), make(tmp_path, "val", 11)


def change(source: Source, function) -> None:
    """Apply a function to the content of a dataset's annotation file."""
    content = json.loads(source.annotations.read_text())
    function(content)
    source.annotations.write_text(json.dumps(content))


def lines_of(data, **options) -> dict[str, list[str]]:
    """The findings by "train", "val" and "both", as printed; fatal ones start with FATAL."""
    *_, findings = clean_splits(*data, **options)
    return {name: [f"{'FATAL ' * f.fatal}{f}" for f in listed] for name, listed in findings.items()}


def test_intact_dataset(data, tmp_path):
    """Detectron2 loads the prepared files like the originals."""
    lines = lines_of(data)
    # The consequence of a category without objects is that for the set at hand
    (train,), (val,) = lines["train"], lines["val"]
    assert "three" in train and "learned" in train and "measured" not in train
    assert "three" in val and "measured" in val and "learned" not in val
    assert lines["both"] == []
    prepared = prepare(*data, tmp_path / "out")
    register([prepared.train, prepared.val])
    records = DatasetCatalog.get(prepared.train)
    assert MetadataCatalog.get(prepared.train).thing_classes == ["three", "seven"]
    assert [Path(r["file_name"]).name for r in records] == ["1.png", "2.png", "3.png"]
    assert all(Path(r["file_name"]).is_absolute() for r in records)
    (annotation,) = records[0]["annotations"]
    assert annotation["category_id"] == 1 and annotation["segmentation"] == SQUARE
    # The originals lack area and iscrowd, which pycocotools reads
    (entry, *_) = COCO(prepared.val).anns.values()
    assert entry["area"] == pytest.approx(100) and entry["iscrowd"] == 0


def annotation(**changes):
    """A change of the first annotation; the value None removes a key."""

    def apply(content):
        entry = content["annotations"][0]
        entry.update(changes)
        for key in [k for k, v in changes.items() if v is None]:
            del entry[key]

    return apply


def category(**changes):
    return lambda content: content["categories"][0].update(changes)


def image(**changes):
    return lambda content: content["images"][0].update(changes)


RLE = coco_mask.encode(np.asfortranarray(np.eye(SIZE[1], SIZE[0], dtype=np.uint8)))
RLE["counts"] = RLE["counts"].decode()
EMPTY = {"size": list(SIZE[::-1]), "counts": [SIZE[0] * SIZE[1]]}
BOWTIE = [[10, 10, 20, 20, 20, 10, 10, 20]]

FATAL = {
    "an unknown category": (annotation(category_id=5), r"category_id .*\(1\)"),
    "an unknown image": (annotation(image_id=5), r"image_id .*\(1\)"),
    "an id of text": (image(id="a"), r"ids of images .*\(a\)"),
    "a duplicate file name": (image(file_name="2.png"), r"file_names of images .*\(2\.png\)"),
    "no file name": (image(file_name=None), r"file_names of images .*\(None\)"),
    "an invalid file name": (image(file_name="a\0"), r"file_names of images .*\(None\)"),
    "no category name": (category(name=None), r"names of categories .*\(None\)"),
    "a duplicate category name": (category(name="three"), r"names of categories .*\(three\)"),
    "a missing image": (image(file_name="9.png"), r"missing .*\(9\.png\): .*images"),
    "not an image": (
        *(image(file_name="../train.json"), r"unreadable .*\(\.\./train\.json: .*PNG"),
    ),
    "a folder as image": (image(file_name="."), r"missing .*\(\.\)"),
    "another size": (image(width=41), r"\(1\.png: 40x30, listed as 41x30\): fix width and height"),
    "no box": (annotation(bbox=None), r"bbox .*\(1\)"),
    "a box of text": (annotation(bbox=["a", 1, 2, 3]), r"bbox .*\(1\)"),
    "a box of nan": (annotation(bbox=[float("nan"), 1, 2, 3]), r"bbox .*\(1\)"),
    "a box outside the image": (annotation(bbox=[40, 1, 5, 5]), r"boxes outside .*\(1\): .*bbox"),
    "RLE of another size": (
        *(annotation(segmentation={**RLE, "size": list(SIZE)}), r"RLE .*size .*\(1\)"),
    ),
    "RLE that is too long": (
        *(annotation(segmentation={**RLE, "counts": [2000]}), r"RLE .*counts .*\(1\)"),
    ),
    "truncated RLE": (
        *(annotation(segmentation={**RLE, "counts": RLE["counts"][:-3]}), r"RLE .*counts .*\(1\)"),
    ),
    "RLE with invalid characters": (
        *(annotation(segmentation={**RLE, "counts": "ÿ\n"}), r"RLE .*counts .*\(1\)"),
    ),
    "RLE without a size": (*(annotation(segmentation={**RLE, "size": 5}), r"RLE .*size .*\(1\)"),),
    "points in triples": (
        *(annotation(segmentation=[[[1, 1, 2], [5, 5, 2], [1, 5, 2]]]), r"polygons nor RLE \(1\)"),
    ),
    "two corners as a box": (annotation(bbox=[10, 10, 20, 20]), r"boxes .*masks \(1\): .*width"),
    "a relative box": (annotation(bbox=[0.25, 0.3, 0.25, 0.3]), r"boxes .*one pixel \(1\)"),
    "a huge box": (annotation(bbox=[1, 1, 10**400, 5]), r"bbox .*\(1\)"),
    "no mask, unlike other objects": (
        *(annotation(segmentation=None), r"without a mask.*\(1\): .*MODEL\.MASK_ON False"),
    ),
}


@pytest.mark.parametrize("case", FATAL)
def test_fatal_findings(case, data, tmp_path):
    """`prepare` raises them, and writes nothing."""
    alter, message = FATAL[case]
    change(data[0], alter)
    fatal = [line for lines in lines_of(data).values() for line in lines if "FATAL" in line]
    assert any(re.search(message, line) for line in fatal), fatal
    with pytest.raises(InputError, match=message):
        prepare(*data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


FIXED = {
    "an empty box": (annotation(bbox=[1, 1, 0, 5]), "empty boxes", None),
    "a box that extends beyond the image": (
        annotation(bbox=[30, 20, 20, 20], segmentation=[[30, 20, 50, 20, 50, 40, 30, 40]]),
        "boxes that extend",
        {"bbox": [30, 20, 10, 10]},
    ),
    "a mask of two points": (annotation(segmentation=[[1, 1, 2, 2]]), "masks without area", None),
    "a mask on a line": (
        *(annotation(segmentation=[[1, 1, 2, 2, 3, 3]]), "masks without area", None),
    ),
    "an empty RLE": (annotation(segmentation=EMPTY), "masks without area", None),
    "an additional polygon without area": (
        *(annotation(segmentation=[*SQUARE, [1, 1]]), "masks with polygons without area"),
        {"segmentation": SQUARE},
    ),
    "a polygon without brackets": (
        *(annotation(segmentation=SQUARE[0]), "", {"segmentation": SQUARE}),
    ),
    "an id of 0": (annotation(id=0), "", {"id": 1}),
    "a duplicate id": (annotation(id=2), "", {"id": 1}),
    "no id": (annotation(id=None), "", {"id": 1}),
    "a bow tie": (
        *(annotation(segmentation=BOWTIE), "self-intersecting"),
        {"segmentation": BOWTIE},
    ),
    "an ignored object": (annotation(ignore=1), "images without objects", {"iscrowd": 1}),
}


@pytest.mark.parametrize("case", FIXED)
def test_automatic_fixes(case, data, tmp_path):
    alter, message, expected = FIXED[case]
    change(data[0], alter)
    assert any(message in line and "FATAL" not in line for line in lines_of(data)["train"])
    content = json.loads(Path(prepare(*data, tmp_path / "out").train).read_text())
    objects = {a["id"]: a for a in content["annotations"]}
    assert {2, 3} <= objects.keys()
    if expected is None:
        assert 1 not in objects
    else:
        assert {key: objects[1][key] for key in expected} == expected


def test_valid_rle_is_accepted():
    """Random masks pass unchanged, compressed by pycocotools or as a list of run lengths."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = np.asfortranarray(rng.random((30, 40)) < rng.random(), dtype=np.uint8)
        rle = coco_mask.encode(mask)
        rle["counts"] = rle["counts"].decode()
        findings = Findings()
        assert clean_mask(1, rle, (30, 40), findings) == rle
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        runs = [0, *runs] if flat[0] else runs
        again = clean_mask(1, {"size": [30, 40], "counts": runs}, (30, 40), findings)
        assert np.array_equal(coco_mask.decode(again), mask)
        assert not list(findings)


def test_images_in_both_sets(data):
    """Identical files are recognized even if their names differ."""
    images = data[0].images
    (images / "12.png").write_bytes((images / "2.png").read_bytes())
    assert "FATAL 1 images in both sets (2.png = 12.png)" in lines_of(data)["both"][0]


def test_categories_that_differ(data):
    change(data[1], lambda c: c["categories"][0].update(name="siete"))
    (line,) = lines_of(data)["both"]
    assert line.startswith("FATAL 1 categories") and "(id 7: seven in train, siete in val)" in line


def test_crowded_images(data):
    def crowd(content):
        first = content["annotations"][0]
        x, y, *sides = first["bbox"]
        boxes = [[x + i / 1000, y, *sides] for i in range(1, 101)]
        content["annotations"] += [{**first, "bbox": box} for box in boxes]

    change(data[0], crowd)
    assert "1 images with more than 100 objects (1.png)" in lines_of(data)["train"][0]


def test_boxes_only(data, tmp_path):
    """Without masks, or with `masks=False`, boxes are sufficient."""
    change(data[0], annotation(segmentation=None))
    assert not lines_of(data, masks=False)["both"]
    for source in data:
        change(source, lambda c: [a.pop("segmentation", 0) for a in c["annotations"]])
    assert not lines_of(data)["both"]
    cfg = read_config_of_shapes()
    assert keys_of(prepare(*data, tmp_path / "out"), cfg)["MODEL.MASK_ON"] is False


def read_config_of_shapes():
    return read_config("Shapes/mask_rcnn_R_18_FPN_gn.yaml")


def test_derived_config_keys(data, tmp_path):
    cfg = read_config_of_shapes()
    keys = keys_of(prepare(*data, tmp_path / "one"), cfg)
    assert keys["MODEL.ROI_HEADS.NUM_CLASSES"] == 2 and keys["MODEL.MASK_ON"] is True
    assert "INPUT.MASK_FORMAT" not in keys
    change(data[0], annotation(segmentation=RLE, bbox=[0, 0, 30, 30]))
    assert keys_of(prepare(*data, tmp_path / "two"), cfg)["INPUT.MASK_FORMAT"] == "bitmask"


def read_as_trained(prepared: Prepared, tmp_path) -> tuple[np.ndarray, dict]:
    """The first training image, as Detectron2's own mapper loads it, and its record."""
    register([prepared.train])
    (record, *_) = DatasetCatalog.get(prepared.train)
    mapper = DatasetMapper(True, augmentations=[], image_format="RGB", use_instance_mask=True)
    return mapper(record)["image"].permute(1, 2, 0).numpy(), record


@pytest.mark.parametrize("listed", ["turned", "as stored"])
def test_image_with_exif_rotation(listed, data, tmp_path):
    """It is rotated only if the listed size is that of the rotated image."""
    rng = np.random.default_rng(5)
    stored = Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    exif = stored.getexif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    stored.save(data[0].images / "1.png", exif=exif)
    turned = stored.transpose(Image.Transpose.ROTATE_270)
    wanted = {"turned": turned, "as stored": stored}[listed]
    change(data[0], image(width=wanted.width, height=wanted.height))
    ignored = any("size ignores their EXIF" in line for line in lines_of(data)["train"])
    assert ignored == (listed == "as stored")
    read, record = read_as_trained(prepare(*data, tmp_path / "out"), tmp_path)
    assert np.array_equal(read, np.asarray(wanted))
    assert (record["width"], record["height"]) == wanted.size


def test_image_of_16_bits(data, tmp_path):
    """Its value range is scaled to 8 bits, not clipped."""
    rng = np.random.default_rng(5)
    values = rng.integers(1000, 3001, SIZE[::-1]).astype(np.uint16)
    values[0, 0] = 2000
    Image.fromarray(values).save(data[0].images / "1.png")
    assert any("8 bits (1.png)" in line for line in lines_of(data)["train"])
    read, _ = read_as_trained(prepare(*data, tmp_path / "out"), tmp_path)
    assert read.shape == (SIZE[1], SIZE[0], 3) and np.array_equal(read[..., 0], read[..., 2])
    expected = ((values - 1000.0) / 2000 * 255).clip(0, 255)
    assert np.abs(read[..., 0] - expected).max() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_modes(mode, data, tmp_path):
    """Detectron2 reads the original files, without copies."""
    file = data[0].images / ("1.tif" if mode == "CMYK" else "1.png")
    Image.new(mode, SIZE, 1).save(file)
    change(data[0], image(file_name=file.name))
    assert len(lines_of(data)["train"]) == 1
    read, record = read_as_trained(prepare(*data, tmp_path / "out"), tmp_path)
    assert record["file_name"] == str(file.resolve())
    assert np.array_equal(read, detection_utils.read_image(str(file), "RGB"))


def test_missing_width_and_height(data, tmp_path):
    change(data[0], lambda c: [c["images"][0].pop(key) for key in ("width", "height")])
    content = json.loads(Path(prepare(*data, tmp_path / "out").train).read_text())
    assert (content["images"][0]["width"], content["images"][0]["height"]) == SIZE


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"images": [1]}', "[" * 100_000, "\x00"])
def test_files_that_are_not_coco_instances(text, data):
    data[0].annotations.write_text(text)
    with pytest.raises(InputError, match=str(data[0].annotations)):
        clean_splits(*data)


def test_resume(data, tmp_path):
    """Prepared files are kept for the same data; for changed data, resuming is an error."""
    out = tmp_path / "out"
    first = prepare(*data, out, resume=True)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(*data, out, resume=True) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    Image.new("RGB", SIZE).save(data[0].images / "1.png")
    with pytest.raises(InputError, match=str(out)):
        prepare(*data, out, resume=True)
    prepare(*data, out)
    assert (out / "train.json").stat().st_mtime_ns > before[out / "train.json"]


def test_annotation_file_without_preparation(data):
    with pytest.raises(InputError, match=f"{data[0].annotations}.*--train"):
        register([str(data[0].annotations)])


def entries(count: int) -> list[dict]:
    return [{"file_name": f"case{i // 4}_{i}.png", "patient": i // 4} for i in range(count)]


def test_split_is_stable():
    """About the requested share; an image keeps its assignment when others are added."""
    digests = [str(i) for i in range(1000)]
    chosen = split(entries(1000), digests, 0.2)
    assert 150 < sum(chosen) < 250
    assert split(entries(500)[::-1], digests[:500][::-1], 0.2) == chosen[:500][::-1]


@pytest.mark.parametrize("group_by", ["patient", r"case(\d+)", r"case\d+"])
def test_groups_stay_together(group_by):
    chosen = split(entries(400), [str(i) for i in range(400)], 0.3, group_by)
    assert all(len({*chosen[i : i + 4]}) == 1 for i in range(0, 400, 4))
    assert 0.2 < sum(chosen) / 400 < 0.4


def test_groups_come_near_to_the_fraction():
    """Ten groups of very different sizes, of which the largest has 29% of the images."""
    sizes = [1, 2, 3, 5, 8, 13, 21, 34, 55, 58]
    entries = [{"file_name": f"{g}_{i}.png", "g": g} for g, n in enumerate(sizes) for i in range(n)]
    digests = [entry["file_name"] for entry in entries]
    for fraction in (0.1, 0.2, 0.3, 0.5):
        chosen = split(entries, digests, fraction, "g")
        held = {e["g"] for e, is_val in zip(entries, chosen, strict=True) if is_val}
        assert sum(chosen) == sum(sizes[g] for g in held), "groups stay whole"
        assert abs(sum(chosen) / 200 - fraction) <= 0.05


def test_a_split_that_is_far_from_the_fraction(data):
    """One patient has almost all images."""

    def group(content):
        for number, image in enumerate(content["images"]):
            image["patient"] = min(number, 1)

    change(data[0], group)
    *_, findings = clean_splits(data[0], None, val_fraction=0.2, group_by="patient")
    share = [f for f in findings["train"] if "instead of 20%" in f.description]
    images = len(json.loads(data[0].annotations.read_text())["images"])
    assert bool(share) == (abs(1 / images - 0.2) > 0.1)


def test_identical_files_stay_together():
    """So do groups that share a file."""
    digests = [str(i) for i in range(400)]
    for i in range(0, 400, 8):
        digests[i + 7] = digests[i]
    chosen = split(entries(400), digests, 0.3, "patient")
    assert all(len({*chosen[i : i + 8]}) == 1 for i in range(0, 400, 8))
    assert 0 < sum(chosen) < 400


@pytest.mark.parametrize(
    ("fraction", "group_by", "message"),
    [
        (0, None, "--val-fraction 0 "),
        (0.0001, None, "--val-fraction 0.0001 .*validation"),
        (0.5, "ward", "--group-by ward .*case0_0.png"),
        (0.5, "(", r"--group-by \( .*regular expression"),
    ],
)
def test_impossible_splits(fraction, group_by, message):
    with pytest.raises(InputError, match=message):
        split(entries(4), ["1", "2", "3", "4"], fraction, group_by)


def test_prepared_split(data, tmp_path):
    """Without a validation set, a disjoint part of the training set is used."""
    prepared = prepare(data[0], None, tmp_path / "out", val_fraction=0.5)
    parts = [
        {image["listed_as"] for image in json.loads(Path(path).read_text())["images"]}
        for path in (prepared.train, prepared.val)
    ]
    assert all(parts) and not parts[0] & parts[1]
    assert parts[0] | parts[1] == {"1.png", "2.png", "3.png"}


def test_inspect_source(data):
    """It has the same findings as cleaning, and also finds missing files and sizes."""
    assert [str(f) for f in inspect_source(data[0], "train")] == lines_of(data)["train"]
    change(data[0], image(file_name="9.png"))
    change(data[0], annotation(bbox=[40, 1, 5, 5]))
    assert sum(f.fatal for f in inspect_source(data[0], "train")) == 2
    change(data[0], lambda c: c["images"][0].pop("width"))
    assert any("width and height (9.png)" in str(f) for f in inspect_source(data[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_every_orientation(ending, orientation, data, tmp_path):
    """Training and prediction read the image as Pillow displays it, in every format."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)[:30]
    stored, file = Image.fromarray(pixels), data[0].images / f"1.{ending}"
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(file, exif=exif, **({"quality": 100} if ending == "jpg" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.read_bytes())))
    size = {"width": upright.width, "height": upright.height}
    change(data[0], image(file_name=file.name, **size))
    reported = any("EXIF orientation (" in line for line in lines_of(data)["train"])
    assert reported == (orientation != 1)
    read, _ = read_as_trained(prepare(*data, tmp_path / "out"), tmp_path)
    assert np.array_equal(read, np.asarray(upright))
    assert np.array_equal(read_image(file), np.asarray(upright)), "prediction"


def test_16_bit_colour_images_are_rejected(data):
    """Pillow would silently drop the lower 8 bits, and give a dark image."""

    def chunk(name: bytes, body: bytes) -> bytes:
        length, check = (struct.pack(">I", n) for n in (len(body), zlib.crc32(name + body)))
        return length + name + body + check

    values = np.full((SIZE[1], SIZE[0], 3), 700, dtype=">u2")
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    header = struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    (data[0].images / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    pattern = r"FATAL 1 colour images .*8 bits .*\(1\.png\)"
    assert any(re.match(pattern, line) for line in lines_of(data)["train"])


def test_user_files_are_not_overwritten(data, tmp_path):
    """The output folder contains the user's own train.json."""
    before = data[0].annotations.read_bytes()
    with pytest.raises(InputError, match=str(data[0].annotations)):
        prepare(*data, tmp_path)
    assert data[0].annotations.read_bytes() == before


def test_interrupted_preparation_is_repeated(data, tmp_path):
    prepare(*data, tmp_path / "out")
    (tmp_path / "out" / "val.json").unlink()
    prepare(*data, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "val.json").is_file()


def test_crowds_have_masks_if_objects_have_masks(data, tmp_path):
    """Detectron2's evaluation reads them; without masks of objects, crowds have none either."""

    def crowd(content):
        first = content["annotations"][0]
        content["annotations"].append({**first, "iscrowd": 1, "segmentation": []})

    change(data[1], crowd)
    content = json.loads(Path(prepare(*data, tmp_path / "one").val).read_text())
    assert content["annotations"][-1]["segmentation"] == [[10, 10, 20, 10, 20, 20, 10, 20]]
    for source in data:
        change(source, lambda c: [a.pop("segmentation", 0) for a in c["annotations"]])
    change(data[1], lambda c: c["annotations"][-1].update(segmentation=RLE))
    content = json.loads(Path(prepare(*data, tmp_path / "two").val).read_text())
    assert not any("segmentation" in a for a in content["annotations"])


def test_categories_in_validation_only(data):
    change(data[1], annotation(category_id=3))
    (line,) = lines_of(data)["both"]
    assert "validation only (three): their AP will be 0" in line


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.META_ARCHITECTURE", "RetinaNet"), ("MODEL.KEYPOINT_ON", True)]
)
def test_unsupported_models(key, value, data, tmp_path):
    cfg = read_config_of_shapes().clone()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=r"--train .* (RetinaNet|keypoints)"):
        keys_of(prepare(*data, tmp_path / "out"), cfg)
