"""Moving shapes: the class is in the motion, and nowhere else."""

from itertools import pairwise

import numpy as np
import pytest

from gn_det.data.moving_shapes import (
    FRAMES,
    MOTIONS,
    SIDE,
    draw_clip,
    draw_path,
    make_moving_shapes,
)
from gn_det.errors import InputError


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motion(motion):
    """The shift between frames that fits them best, found by correlation, is that of the class."""
    clip = draw_clip(rng(0), motion).astype(float).mean(3)
    moving = np.diff(clip, axis=0)
    total = np.zeros((SIDE, SIDE))
    for one, two in pairwise(moving):
        total += np.fft.ifft2(np.conj(np.fft.fft2(one)) * np.fft.fft2(two)).real
    row, column = np.unravel_index(total.argmax(), total.shape)
    shift = np.array([column, row])
    shift = np.where(shift > SIDE // 2, shift - SIDE, shift)
    assert np.sign(shift).tolist() == list(MOTIONS[motion])


def test_a_single_frame_says_nothing():
    """In each frame, the centres of all classes are equally distributed over the image."""
    for motion in MOTIONS:
        paths = np.stack([draw_path(rng(i), motion) for i in range(2000)])
        for time in (0, FRAMES // 2, FRAMES - 1):
            counts, *_ = np.histogram2d(*paths[:, time].T, bins=4, range=[(0, SIDE)] * 2)
            # 125 are expected in each cell, with a standard deviation of 11
            assert abs(counts - 125).max() < 55


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        make_moving_shapes(tmp_path / name, 8, 4, seed)
    one, two, three = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.png")}
        for name in ("one", "two", "three")
    )
    assert one == two and one.keys() == three.keys() and one != three
    assert len(one) == 12 * FRAMES
    assert {p.parts[:2] for p in one} == {(s, m) for s in ("train", "val") for m in MOTIONS}
    with pytest.raises(InputError, match="one exists"):
        make_moving_shapes(tmp_path / "one")
