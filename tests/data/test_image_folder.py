"""Data loaders and mapper for image folders."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

from gn_det.config_file import read_config
from gn_det.data.image_folder import (
    ImageMapper,
    build_test_loader,
    build_train_loader,
    read_folder,
)
from gn_det.errors import InputError


def config(*opts: object) -> CfgNode:
    words = ["DATALOADER.NUM_WORKERS", "0", *map(str, opts)]
    return read_config("ImageNet-Classification/R_50_gn.yaml", words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three red images of class cat and four blue images of class dog, of different sizes."""
    folder = tmp_path_factory.mktemp("images")
    for name, colour, count in (("cat", (250, 10, 20), 3), ("dog", (0, 0, 200), 4)):
        (folder / name).mkdir()
        for i in range(count):
            size = (60 + 10 * i, 90 - 5 * i)
            Image.new("RGB", size, colour).save(folder / name / f"{i}.png")
    return folder


def test_training_loader(folder):
    """Each epoch has every image once, in another order."""
    cfg = config(
        "DATASETS.TRAIN", f"('{folder}',)", "SOLVER.IMS_PER_BATCH", 7, "PRETRAIN.IMAGE_SIZE", 32
    )
    torch.manual_seed(0)
    epochs = list(islice(build_train_loader(cfg), 5))
    files = sorted(map(str, folder.glob("*/*.png")))
    for batch in epochs:
        assert sorted(record["file_name"] for record in batch) == files
        for record in batch:
            assert record["image"].shape == (3, 32, 32) and record["image"].dtype == torch.uint8
            assert record["label"] == ("dog" in record["file_name"])
    assert len({tuple(record["file_name"] for record in batch) for batch in epochs}) > 1


def test_test_loader_gives_each_image_once(folder):
    cfg = config("SOLVER.IMS_PER_BATCH", 4, "PRETRAIN.IMAGE_SIZE", 32)
    batches = list(build_test_loader(cfg, str(folder)))
    assert [len(batch) for batch in batches] == [4, 3]
    names = [record["file_name"] for batch in batches for record in batch]
    assert sorted(names) == sorted(map(str, folder.glob("*/*.png")))


@pytest.mark.parametrize(("order", "pixel"), [("RGB", (250, 10, 20)), ("BGR", (20, 10, 250))])
def test_channel_order(order, pixel, folder):
    mapper = ImageMapper(config("INPUT.FORMAT", order), is_train=False)
    image = mapper((str(folder / "cat/0.png"), 0))["image"]
    assert image[:, 100, 100].tolist() == list(pixel)


def test_test_images_are_center_cropped(tmp_path):
    """A 512 x 256 ramp is not resized, and its middle 224 x 224 pixels are cropped."""
    ramp = np.repeat(np.arange(512)[None] // 2, 256, axis=0).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image = ImageMapper(config(), is_train=False)((str(tmp_path / "ramp.png"), 0))["image"]
    assert image.shape == (3, 224, 224)
    torch.testing.assert_close(image[0], torch.from_numpy(ramp[16:240, 144:368]))


def test_training_images_are_augmented(tmp_path):
    """Crop scale, flip and brightness change the slope of a ramp, its sign, and its mean."""
    ramp = np.repeat(np.arange(256)[None], 256, axis=0).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    torch.manual_seed(0)
    mapper = ImageMapper(config(), is_train=True)
    rows = [mapper((str(tmp_path / "ramp.png"), 0))["image"][0, 0].double() for _ in range(60)]
    spans = [(row[-1] - row[0]).item() for row in rows]
    assert 15 < sum(span < 0 for span in spans) < 45, "flipped half of the time"
    widths = [abs(span) / 256 for span in spans]
    assert min(widths) < 0.5 and max(widths) > 0.75
    assert len({round(row.mean().item()) for row in rows}) > 20
    mild = ImageMapper(config("PRETRAIN.MIN_CROP_AREA", 1.0), is_train=True)
    uncropped = [mild((str(tmp_path / "ramp.png"), 0))["image"][0, 0].double() for _ in range(10)]
    # Brightness and contrast scale the ramp by at least 0.6 each
    assert min(abs((row[-1] - row[0]).item()) for row in uncropped) > 0.36 * 250


def test_paths_relative_to_detectron2_datasets(shapes):
    folder = read_folder("shapes/crops/train")
    assert Path(folder.root) == shapes / "crops/train"
    assert folder.classes == ["cross", "disc", "ring", "square", "star", "triangle"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image(num_workers, tmp_path):
    """The error is one sentence, also from a worker process."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/broken.jpg").write_bytes(b"not an image")
    cfg = config("DATALOADER.NUM_WORKERS", num_workers, "SOLVER.IMS_PER_BATCH", 1)
    with pytest.raises(InputError) as error:
        next(iter(build_test_loader(cfg, str(tmp_path))))
    assert str(error.value).startswith(f"{tmp_path}/cat/broken.jpg ")
    assert "\n" not in str(error.value)
