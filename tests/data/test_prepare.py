"""A data set of one's own: what is noticed, what is done about it, and what is trained on."""

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
from gn_det.data.clean import Source, look, survey
from gn_det.data.findings import Findings
from gn_det.data.image_files import read_image
from gn_det.data.masks import clean_mask
from gn_det.data.prepare import Prepared, keys_of, prepare, register
from gn_det.data.split import split
from gn_det.errors import InputError

SIZE = (40, 30)  # width, height
SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


def make(folder: Path, name: str, first: int = 1) -> Source:
    """Three pictures with an object each, of two categories whose ids have gaps."""
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
    content = json.loads(source.annotations.read_text())
    function(content)
    source.annotations.write_text(json.dumps(content))


def noticed(data, **options) -> dict[str, list[str]]:
    *_, found = look(*data, **options)
    return {
        name: [f"{'STOPS ' * f.stops}{f}" for f in findings] for name, findings in found.items()
    }


def test_a_good_one(data, tmp_path):
    """What Detectron2 makes of the prepared files is what it would make of good originals."""
    found = noticed(data)
    # Each set says of itself alone what a category without objects means
    (train,), (val,) = found["train"], found["val"]
    assert "three" in train and "learned" in train and "measured" not in train
    assert "three" in val and "measured" in val and "learned" not in val
    assert found["both"] == []
    prepared = prepare(*data, tmp_path / "out")
    register([prepared.train, prepared.val])
    records = DatasetCatalog.get(prepared.train)
    assert MetadataCatalog.get(prepared.train).thing_classes == ["three", "seven"]
    assert [Path(r["file_name"]).name for r in records] == ["1.png", "2.png", "3.png"]
    assert all(Path(r["file_name"]).is_absolute() for r in records)
    (annotation,) = records[0]["annotations"]
    assert annotation["category_id"] == 1 and annotation["segmentation"] == SQUARE
    # area and iscrowd, which pycocotools reads, were not there
    (entry, *_) = COCO(prepared.val).anns.values()
    assert entry["area"] == pytest.approx(100) and entry["iscrowd"] == 0


def annotation(**changes):
    """A change of the first annotation; None takes a key out."""

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

STOPPING = {
    "an unknown category": (annotation(category_id=5), "annotations of unknown categories"),
    "an unknown picture": (annotation(image_id=5), "annotations of pictures that are not listed"),
    "an id of text": (image(id="a"), "ids of images that are missing, no number or twice"),
    "a file listed twice": (
        image(file_name="2.png"),
        "file_names of images that are missing, no text or twice",
    ),
    "no file name": (image(file_name=None), "file_names of images that are missing, no text"),
    "no name for a file": (image(file_name="a\0"), "file_names of images that are missing"),
    "no name of a category": (category(name=None), "names of categories that are missing"),
    "one name for two": (
        category(name="three"),
        "names of categories that are missing, no text or",
    ),
    "a missing picture": (image(file_name="9.png"), r"1 pictures missing \(9\.png\): put them"),
    "no picture": (lambda c: c["images"][0].update(file_name="../train.json"), "no picture"),
    "a folder as picture": (image(file_name="."), "pictures missing"),
    "another size": (image(width=41), r"of another size than listed \(1\.png: 40x30, listed as 41"),
    "no box": (annotation(bbox=None), "annotations without a box of four numbers"),
    "a box of text": (annotation(bbox=["a", 1, 2, 3]), "annotations without a box"),
    "a box of nan": (annotation(bbox=[float("nan"), 1, 2, 3]), "annotations without a box"),
    "a box elsewhere": (annotation(bbox=[40, 1, 5, 5]), "boxes outside their picture"),
    "RLE of another size": (
        annotation(segmentation={**RLE, "size": list(SIZE)}),
        "masks of another size than their picture",
    ),
    "RLE that is too long": (
        annotation(segmentation={**RLE, "counts": [2000]}),
        "masks that are no RLE of their picture",
    ),
    "RLE that is cut": (
        annotation(segmentation={**RLE, "counts": RLE["counts"][:-3]}),
        "masks that are no RLE of their picture",
    ),
    "RLE of nonsense": (annotation(segmentation={**RLE, "counts": "ÿ\n"}), "masks that are no RLE"),
    "RLE without a size": (
        annotation(segmentation={**RLE, "size": 5}),
        "masks of another size than their picture",
    ),
    "points in pairs": (
        annotation(segmentation=[[[1, 1], [5, 5], [1, 5]]]),
        "masks that are neither polygons nor RLE",
    ),
    "two corners as a box": (annotation(bbox=[10, 10, 20, 20]), "not around their masks"),
    "shares of the picture": (annotation(bbox=[0.25, 0.3, 0.25, 0.3]), "less than one pixel"),
    "a huge box": (annotation(bbox=[1, 1, 10**400, 5]), "annotations without a box"),
    "no mask beside others": (annotation(segmentation=None), "objects without a mask, others"),
}


@pytest.mark.parametrize("case", STOPPING)
def test_what_stops(case, data, tmp_path):
    """Nothing is written, and the message says all."""
    alter, message = STOPPING[case]
    change(data[0], alter)
    stops = [line for lines in noticed(data).values() for line in lines if "STOPS" in line]
    assert any(re.search(message, line) for line in stops), stops
    with pytest.raises(InputError, match=message):
        prepare(*data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MENDED = {
    "an empty box": (annotation(bbox=[1, 1, 0, 5]), "empty boxes", None),
    "a box across the border": (
        annotation(bbox=[30, 20, 20, 20], segmentation=[[30, 20, 50, 20, 50, 40, 30, 40]]),
        "boxes that leave their picture",
        {"bbox": [30, 20, 10, 10]},
    ),
    "a mask of two points": (annotation(segmentation=[[1, 1, 2, 2]]), "masks without area", None),
    "a mask on a line": (
        *(annotation(segmentation=[[1, 1, 2, 2, 3, 3]]), "masks without area", None),
    ),
    "an empty RLE": (annotation(segmentation=EMPTY), "masks without area", None),
    "a polygon too many": (
        *(annotation(segmentation=[*SQUARE, [1, 1]]), "masks with polygons without area"),
        {"segmentation": SQUARE},
    ),
    "a polygon without brackets": (
        *(annotation(segmentation=SQUARE[0]), "", {"segmentation": SQUARE}),
    ),
    "an id of 0": (annotation(id=0), "", {"id": 1}),
    "an id of another": (annotation(id=2), "", {"id": 1}),
    "no id": (annotation(id=None), "", {"id": 1}),
    "a bow tie": (
        *(annotation(segmentation=BOWTIE), "polygons that cross themselves"),
        {"segmentation": BOWTIE},
    ),
    "an ignored object": (annotation(ignore=1), "pictures without objects", {"iscrowd": 1}),
}


@pytest.mark.parametrize("case", MENDED)
def test_what_is_mended(case, data, tmp_path):
    alter, message, expected = MENDED[case]
    change(data[0], alter)
    assert any(message in line and "STOPS" not in line for line in noticed(data)["train"])
    content = json.loads(Path(prepare(*data, tmp_path / "out").train).read_text())
    found = {a["id"]: a for a in content["annotations"]}
    assert {2, 3} <= found.keys()
    if expected is None:
        assert 1 not in found
    else:
        assert {key: found[1][key] for key in expected} == expected


def test_rle_is_read_as_pycocotools_does():
    """Random masks pass unchanged, compressed or as a list; a changed letter never covers more."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = np.asfortranarray(rng.random((30, 40)) < rng.random(), dtype=np.uint8)
        rle = coco_mask.encode(mask)
        rle["counts"] = rle["counts"].decode()
        found = Findings()
        assert clean_mask(1, rle, (30, 40), found) == rle
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        runs = [0, *runs] if flat[0] else runs
        again = clean_mask(1, {"size": [30, 40], "counts": runs}, (30, 40), found)
        assert np.array_equal(coco_mask.decode(again), mask)
        assert not list(found)


def test_images_in_both_sets(data):
    """Known by their content, whatever their names."""
    images = data[0].images
    (images / "12.png").write_bytes((images / "2.png").read_bytes())
    assert "STOPS 1 pictures in both sets (2.png is 12.png)" in noticed(data)["both"][0]


def test_categories_that_differ(data):
    change(data[1], lambda c: c["categories"][0].update(name="siete"))
    assert "STOPS 1 categories that differ (7 is seven and siete)" in noticed(data)["both"][0]


def test_crowded_images(data):
    def crowd(content):
        first = content["annotations"][0]
        content["annotations"] += [{**first, "id": 100 + i} for i in range(100)]

    change(data[0], crowd)
    assert "1 pictures with more than 100 objects (1.png)" in noticed(data)["train"][0]


def test_boxes_alone(data, tmp_path):
    """Without any mask, or where none are wanted, it is a data set of boxes."""
    change(data[0], annotation(segmentation=None))
    assert not noticed(data, masks=False)["both"]
    for source in data:
        change(source, lambda c: [a.pop("segmentation", 0) for a in c["annotations"]])
    assert not noticed(data)["both"]
    cfg = read_config_of_shapes()
    assert keys_of(prepare(*data, tmp_path / "out"), cfg)["MODEL.MASK_ON"] is False


def read_config_of_shapes():
    return read_config("Shapes/mask_rcnn_R_18_FPN_gn.yaml")


def test_keys_that_follow(data, tmp_path):
    cfg = read_config_of_shapes()
    keys = keys_of(prepare(*data, tmp_path / "one"), cfg)
    assert keys["MODEL.ROI_HEADS.NUM_CLASSES"] == 2 and keys["MODEL.MASK_ON"] is True
    assert "INPUT.MASK_FORMAT" not in keys
    change(data[0], annotation(segmentation=RLE, bbox=[0, 0, 30, 30]))
    assert keys_of(prepare(*data, tmp_path / "two"), cfg)["INPUT.MASK_FORMAT"] == "bitmask"


def read_as_trained(prepared: Prepared, tmp_path) -> tuple[np.ndarray, dict]:
    """The first picture as Detectron2's own mapper gives it."""
    register([prepared.train])
    (record, *_) = DatasetCatalog.get(prepared.train)
    mapper = DatasetMapper(True, augmentations=[], image_format="RGB", use_instance_mask=True)
    return mapper(record)["image"].permute(1, 2, 0).numpy(), record


@pytest.mark.parametrize("listed", ["turned", "as stored"])
def test_a_image_that_exif_rotates(listed, data, tmp_path):
    """It is read in the frame that the listed size tells, and no other."""
    rng = np.random.default_rng(5)
    stored = Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    exif = stored.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    stored.save(data[0].images / "1.png", exif=exif)
    turned = stored.transpose(Image.Transpose.ROTATE_270)
    wanted = {"turned": turned, "as stored": stored}[listed]
    change(data[0], image(width=wanted.width, height=wanted.height))
    told = any("pictures that EXIF rotates" in line for line in noticed(data)["train"])
    assert told == (listed == "as stored")
    read, record = read_as_trained(prepare(*data, tmp_path / "out"), tmp_path)
    assert np.array_equal(read, np.asarray(wanted))
    assert (record["width"], record["height"]) == wanted.size


def test_a_image_of_16_bits(data, tmp_path):
    """Its own range becomes that of 8 bits, rather than being cut off."""
    rng = np.random.default_rng(5)
    values = rng.integers(1000, 3001, SIZE[::-1]).astype(np.uint16)
    values[0, 0] = 2000
    Image.fromarray(values).save(data[0].images / "1.png")
    assert any("of more than 8 bits (1.png)" in line for line in noticed(data)["train"])
    read, _ = read_as_trained(prepare(*data, tmp_path / "out"), tmp_path)
    assert read.shape == (SIZE[1], SIZE[0], 3) and np.array_equal(read[..., 0], read[..., 2])
    expected = ((values - 1000.0) / 2000 * 255).clip(0, 255)
    assert np.abs(read[..., 0] - expected).max() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_modes(mode, data, tmp_path):
    """They are left where they are, for Detectron2 to read."""
    file = data[0].images / ("1.tif" if mode == "CMYK" else "1.png")
    Image.new(mode, SIZE, 1).save(file)
    change(data[0], image(file_name=file.name))
    assert len(noticed(data)["train"]) == 1
    read, record = read_as_trained(prepare(*data, tmp_path / "out"), tmp_path)
    assert record["file_name"] == str(file.resolve())
    assert np.array_equal(read, detection_utils.read_image(str(file), "RGB"))


def test_size_that_is_not_listed(data, tmp_path):
    change(data[0], lambda c: [c["images"][0].pop(key) for key in ("width", "height")])
    content = json.loads(Path(prepare(*data, tmp_path / "out").train).read_text())
    assert (content["images"][0]["width"], content["images"][0]["height"]) == SIZE


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"images": [1]}', "[" * 100_000, "\x00"])
def test_files_that_are_no_data_set(text, data):
    data[0].annotations.write_text(text)
    with pytest.raises(InputError, match=str(data[0].annotations)):
        look(*data)


def test_going_on(data, tmp_path):
    """The same data is taken as it is; other data is not gone on with."""
    out = tmp_path / "out"
    first = prepare(*data, out, going_on=True)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(*data, out, going_on=True) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    Image.new("RGB", SIZE).save(data[0].images / "1.png")
    with pytest.raises(InputError, match="was made from other annotations, pictures or options"):
        prepare(*data, out, going_on=True)
    prepare(*data, out)
    assert (out / "train.json").stat().st_mtime_ns > before[out / "train.json"]


def test_a_file_that_was_not_looked_at(data):
    with pytest.raises(InputError, match="has not been looked at: give it with --train or --val"):
        register([str(data[0].annotations)])


def entries(count: int) -> list[dict]:
    return [{"file_name": f"case{i // 4}_{i}.png", "patient": i // 4} for i in range(count)]


def test_split_is_stable():
    """About the asked share, and a picture stays on its side when others come."""
    digests = [str(i) for i in range(1000)]
    chosen = split(entries(1000), digests, 0.2)
    assert 150 < sum(chosen) < 250
    assert split(entries(500)[::-1], digests[:500][::-1], 0.2) == chosen[:500][::-1]


@pytest.mark.parametrize("group_by", ["patient", r"case(\d+)", r"case\d+"])
def test_groups_are_not_divided(group_by):
    chosen = split(entries(400), [str(i) for i in range(400)], 0.3, group_by)
    assert all(len({*chosen[i : i + 4]}) == 1 for i in range(0, 400, 4))
    assert 0.2 < sum(chosen) / 400 < 0.4


def test_equal_files_are_not_divided():
    """Nor are the groups that they link."""
    digests = [str(i) for i in range(400)]
    for i in range(0, 400, 8):
        digests[i + 7] = digests[i]
    chosen = split(entries(400), digests, 0.3, "patient")
    assert all(len({*chosen[i : i + 8]}) == 1 for i in range(0, 400, 8))
    assert 0 < sum(chosen) < 400


@pytest.mark.parametrize(
    ("fraction", "group_by", "message"),
    [
        (0, None, "--val-fraction 0 must be between 0 and 1"),
        (0.0001, None, "leaves none for validation"),
        (0.5, "ward", "--group-by ward is neither a field of case0_0.png's entry, nor found"),
        (0.5, "(", r"--group-by \( is no regular expression"),
    ],
)
def test_splits_that_cannot_be(fraction, group_by, message):
    with pytest.raises(InputError, match=message):
        split(entries(4), ["1", "2", "3", "4"], fraction, group_by)


def test_prepared_split(data, tmp_path):
    """Without a validation set a part of the training set is one, and shares nothing with it."""
    prepared = prepare(data[0], None, tmp_path / "out", val_fraction=0.5)
    parts = [
        {image["listed_as"] for image in json.loads(Path(path).read_text())["images"]}
        for path in (prepared.train, prepared.val)
    ]
    assert all(parts) and not parts[0] & parts[1]
    assert parts[0] | parts[1] == {"1.png", "2.png", "3.png"}


def test_survey(data):
    """Without reading pictures the annotations are judged alike, and missing files are known."""
    assert [str(f) for f in survey(data[0], "train")] == noticed(data)["train"]
    change(data[0], image(file_name="9.png"))
    change(data[0], annotation(bbox=[40, 1, 5, 5]))
    assert sum(f.stops for f in survey(data[0])) == 2
    change(data[0], lambda c: c["images"][0].pop("width"))
    assert any("without width and height (9.png)" in str(f) for f in survey(data[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_every_orientation(ending, orientation, data, tmp_path):
    """What is trained on is what Pillow shows upright, in every format."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)[:30]
    stored, file = Image.fromarray(pixels), data[0].images / f"1.{ending}"
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(file, exif=exif, **({"quality": 100} if ending == "jpg" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.read_bytes())))
    size = {"width": upright.width, "height": upright.height}
    change(data[0], image(file_name=file.name, **size))
    told = any("pictures that EXIF turns" in line for line in noticed(data)["train"])
    assert told == (orientation != 1)
    read, _ = read_as_trained(prepare(*data, tmp_path / "out"), tmp_path)
    assert np.array_equal(read, np.asarray(upright))
    assert np.array_equal(read_image(file), np.asarray(upright)), "and predicted on"


def test_colours_of_16_bits_are_refused(data):
    """Pillow would keep their upper halves, and show a dark picture without a word."""

    def chunk(name: bytes, body: bytes) -> bytes:
        length, check = (struct.pack(">I", n) for n in (len(body), zlib.crc32(name + body)))
        return length + name + body + check

    values = np.full((SIZE[1], SIZE[0], 3), 700, dtype=">u2")
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    header = struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    (data[0].images / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    told = "STOPS 1 pictures of more than 8 bits in colour (1.png)"
    assert any(told in line for line in noticed(data)["train"])


def test_nothing_of_the_user_is_overwritten(data, tmp_path):
    """A folder that has annotations under the names that would be written."""
    before = data[0].annotations.read_bytes()
    with pytest.raises(InputError, match=r"train.json is yours, and would be overwritten"):
        prepare(*data, tmp_path)
    assert data[0].annotations.read_bytes() == before


def test_an_interrupted_preparation_is_done_again(data, tmp_path):
    prepare(*data, tmp_path / "out")
    (tmp_path / "out" / "val.json").unlink()
    prepare(*data, tmp_path / "out", going_on=True)
    assert (tmp_path / "out" / "val.json").is_file()


def test_crowds_have_masks_where_objects_have(data, tmp_path):
    """Detectron2's evaluation reads them; and where no object has one, crowds have none."""

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


def test_classes_that_are_measured_and_never_learnt(data):
    change(data[1], annotation(category_id=3))
    told = "1 categories with objects in validation alone (three): their AP will be 0"
    assert told in noticed(data)["both"][0]


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.META_ARCHITECTURE", "RetinaNet"), ("MODEL.KEYPOINT_ON", True)]
)
def test_models_that_it_is_not_for(key, value, data, tmp_path):
    cfg = read_config_of_shapes().clone()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=r"--train is for Faster and Mask R-CNN"):
        keys_of(prepare(*data, tmp_path / "out"), cfg)
