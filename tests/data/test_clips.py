"""Clips of folders of frames and of video files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from gn_det.config_file import read_config
from gn_det.data.clips import ClipMapper, list_clips, read_frames
from gn_det.data.image_files import UnreadableImageError
from gn_det.errors import InputError

COUNT = 20


def frame(number: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A plain frame, in a red that is its number times 10."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 10 * number
    pixels[..., 2] = 200
    return pixels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, clip in (("walk", "one"), ("run", "two"), ("run", "three")):
        folder = tmp_path / label / clip
        folder.mkdir(parents=True)
        for number in range(COUNT):
            Image.fromarray(frame(number)).save(folder / f"{number:03d}.png")
    return tmp_path


def mapper(is_train: bool, *opts: object) -> ClipMapper:
    keys = ["PRETRAIN.FRAMES", 4, "PRETRAIN.FRAME_STRIDE", 3, "PRETRAIN.IMAGE_SIZE", 32, *opts]
    return ClipMapper(read_config("Shapes/clips_R_18_gn.yaml", [*TINY, *map(str, keys)]), is_train)


def numbers(image: torch.Tensor, channel: int = 2) -> list[int]:
    """The numbers of the frames of a clip (3, T, H, W), in BGR."""
    assert (image[channel] == image[channel, :, :1, :1]).all()
    return (image[channel, :, 0, 0] // 10).tolist()


def test_a_folder_of_frames_is_one_sample(root):
    folder = list_clips(root)
    assert folder.classes == ["run", "walk"] and len(folder) == 3
    assert {(Path(path).name, label) for path, label in folder.samples} == {
        *(("one", 1), ("two", 0), ("three", 0))
    }


def test_frames_without_a_folder_are_refused(root):
    Image.fromarray(frame(1)).save(root / "walk" / "stray.png")
    with pytest.raises(InputError, match=r"stray\.png"):
        list_clips(root)


def test_training_clips(root):
    """Random starts over the whole video, all frames with the same crop."""
    sample = list_clips(root).samples[0]
    starts = set()
    for _ in range(60):
        item = mapper(True)(sample)
        assert item["image"].shape == (3, 4, 32, 32) and item["image"].dtype == torch.uint8
        found = numbers(item["image"])
        assert np.diff(found).tolist() == [3, 3, 3]
        starts.add(found[0])
    assert starts == set(range(COUNT - 9))


def test_test_clips(root):
    """One from the middle, or several at equal distances, in the order of INPUT.FORMAT."""
    sample = list_clips(root).samples[0]
    (middle,) = mapper(False)(sample)["image"]
    assert numbers(middle) == [5, 8, 11, 14]
    clips = mapper(False, "PRETRAIN.TEST_CLIPS", 3)(sample)["image"]
    assert [numbers(clip)[0] for clip in clips] == [0, 5, 10]
    (rgb,) = mapper(False, "INPUT.FORMAT", "RGB")(sample)["image"]
    assert numbers(rgb, channel=0) == [5, 8, 11, 14]


def test_a_short_video_repeats_its_last_frame(root):
    sample = list_clips(root).samples[0]
    (clip,) = mapper(False, "PRETRAIN.FRAME_STRIDE", 9)(sample)["image"]
    assert numbers(clip) == [0, 9, 18, 19]


def test_a_flip_turns_all_frames_and_can_be_switched_off(root):
    path = Path(list_clips(root).samples[0][0])
    for file in path.iterdir():
        pixels = np.zeros((40, 48, 3), np.uint8)
        pixels[:, :24] = 255
        Image.fromarray(pixels).save(file)
    sides = {"horizontal": set(), "none": set()}
    for kind, found in sides.items():
        for _ in range(20):
            image = mapper(True, "INPUT.RANDOM_FLIP", kind)((str(path), 0))["image"]
            left, right = (image[0, :, 16, x] > 127 for x in (1, -2))
            assert len({*left.tolist()}) == len({*right.tolist()}) == 1
            found.add((left[0].item(), right[0].item()))
    assert sides["none"] == {(True, False)} and (False, True) in sides["horizontal"]


def test_an_unreadable_frame_names_its_file(root):
    path = Path(list_clips(root).samples[0][0])
    for file in path.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=path.name):
        mapper(True)((str(path), 0))


def write_video(path: Path) -> None:
    av = pytest.importorskip("av", reason="needs PyAV")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.bit_rate = 48, 40, 4_000_000
        for number in range(COUNT):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame(number), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.mkv"])
def test_videos(tmp_path, name):
    """The frames that were written, within the loss of the compression."""
    (tmp_path / "walk").mkdir()
    write_video(tmp_path / "walk" / name)
    folder = list_clips(tmp_path)
    assert folder.samples == [(str(tmp_path / "walk" / name), 0)]
    frames = read_frames(tmp_path / "walk" / name, [2, 9, 19])
    for number, pixels in frames.items():
        assert abs(pixels.astype(int) - frame(number)).mean() < 6
    (clip,) = mapper(False)(folder.samples[0])["image"]
    middle = clip[2, :, 16, 16].float() / 10
    assert (middle - torch.tensor([5.0, 8, 11, 14])).abs().max() < 0.8


def test_a_damaged_video_names_its_file(tmp_path):
    pytest.importorskip("av", reason="needs PyAV")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UnreadableImageError, match=r"broken\.mp4"):
        mapper(False)((str(tmp_path / "broken.mp4"), 0))
