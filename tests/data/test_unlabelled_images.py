"""Unlabelled images: random choice, square crop, channel order and bit depth."""

import numpy as np
import pytest
import torch
from PIL import Image

from gn_det.data.unlabelled_images import choose_images, load_images
from gn_det.errors import InputError


def test_channel_order_and_square_crop(tmp_path):
    """A wide image loses its sides; BGR has the channels of RGB in reverse."""
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    rgb, bgr = (load_images([tmp_path / "wide.png"], 8, f) for f in ("RGB", "BGR"))
    assert rgb.shape == (1, 3, 8, 8) and rgb.dtype == torch.uint8
    assert rgb[0, :, 4, 4].tolist() == [200, 100, 50] and bgr[0, :, 4, 4].tolist() == [50, 100, 200]
    assert (rgb == rgb[:, :, :1, :1]).all()


def test_grey_image_with_exif_orientation(tmp_path):
    image = Image.fromarray(np.repeat(np.uint8([[0], [255]]), 2, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    assert load_images([tmp_path / "turned.png"], 2, "RGB")[0, 0].tolist() == [[255] * 2, [0] * 2]


def test_sixteen_bits(tmp_path):
    """Values are scaled to 8 bits, as for training and prediction; Pillow would clip them."""
    ramp = np.repeat(np.linspace(1000, 3000, 64)[None], 64, axis=0).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = load_images([tmp_path / "deep.png"], 64, "RGB")[0].double()
    wanted = torch.linspace(0, 255, 64, dtype=torch.float64).expand(3, 64, 64)
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=1)


def test_choose_images(tmp_path):
    for i in range(6):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    for name in ("notes.txt", "._0.png", "paper.pdf", "drawing.eps"):
        (tmp_path / name).write_text("")
    chosen = choose_images(tmp_path, 4)
    assert len({*chosen}) == 4 and chosen == choose_images(tmp_path, 4)
    assert len(choose_images(tmp_path, 99)) == 6


def test_unreadable_image(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        load_images([tmp_path / "broken.jpg"], 8, "RGB")
