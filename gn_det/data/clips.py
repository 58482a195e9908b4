"""Clips for classification, of folders of frames or of video files."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import InputError
from .image_files import UnreadableImageError, read_image

VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")
# Shorter side of a training frame relative to the crop: 256 to 320 pixels for 224, as in "Non-local
# Neural Networks"; the smaller one in evaluation
SCALES = (256 / 224, 320 / 224)


def list_clips(root: Path) -> ImageFolder:
    """List the clips below class folders; each is a video file or a folder of frames.

    Returns:
        torchvision's dataset, whose `samples` are (path of a video or of a folder, class index).

    Raises:
        InputError: for frames that are not in a folder of their own.
        OSError: if the folder cannot be read.
    """
    known = (*IMG_EXTENSIONS, *VIDEOS)
    folder = ImageFolder(
        str(root), is_valid_file=lambda path: path.lower().endswith(known), allow_empty=True
    )
    clips: dict[str, int] = {}
    for name, label in folder.samples:
        path = Path(name)
        video = path.suffix.lower() in VIDEOS
        if not video and path.parent.parent == root:
            raise InputError(f"{path}: the frames of each clip must be in a folder of their own")
        clips.setdefault(str(path if video else path.parent), label)
    folder.samples = list(clips.items())
    return folder


class ClipMapper:
    """Map a sample of `list_clips` to a dict in Detectron2's format.

    A training clip has `PRETRAIN.FRAMES` frames, `PRETRAIN.FRAME_STRIDE` apart, from a random
    start. All its frames get one random scale, crop and flip (`INPUT.RANDOM_FLIP`). A test sample
    has `PRETRAIN.TEST_CLIPS` clips at equal distances, or one from the middle, center-cropped. The
    last frame of a shorter video is repeated.

    Args:
        cfg: gives the keys above, `PRETRAIN.IMAGE_SIZE` and `INPUT.FORMAT`.
        is_train: whether to augment.
    """

    def __init__(self, cfg: CfgNode, is_train: bool) -> None:
        keys = cfg.PRETRAIN
        self._bgr, self._is_train = cfg.INPUT.FORMAT == "BGR", is_train
        self._side, self._clips = keys.IMAGE_SIZE, keys.TEST_CLIPS
        self._offsets = keys.FRAME_STRIDE * np.arange(keys.FRAMES)
        crop = T.RandomCrop(self._side) if is_train else T.CenterCrop(self._side)
        flip = [T.RandomHorizontalFlip()] if cfg.INPUT.RANDOM_FLIP == "horizontal" else []
        self._transform = T.Compose([crop, *(flip if is_train else [])])

    def __call__(self, sample: tuple[str, int]) -> dict[str, Any]:
        """Load and transform the frames.

        Args:
            sample: path and class index.

        Returns:
            "file_name", "label", and "image", a uint8 tensor in `INPUT.FORMAT`: (3, T, side, side)
            for training, else (clips, 3, T, side, side).

        Raises:
            UnreadableImageError: if frames cannot be read.
        """
        path, label = sample
        try:
            count = count_frames(Path(path))
            indices = self._indices(count)
            frames = read_frames(Path(path), sorted({*indices.ravel().tolist()}))
        except InputError as error:
            raise UnreadableImageError(str(error)) from None
        scale = random.uniform(*SCALES) if self._is_train else SCALES[0]
        order = sorted(frames)
        pixels = torch.from_numpy(np.stack([frames[i] for i in order])).permute(0, 3, 1, 2)
        pixels = self._transform(T.functional.resize(pixels, [round(scale * self._side)]))
        pixels = pixels.flip(1) if self._bgr else pixels
        places = {frame: place for place, frame in enumerate(order)}
        clips = [self._clip(pixels, [places[i] for i in row.tolist()]) for row in indices]
        image = clips[0] if self._is_train else torch.stack(clips)
        return {"file_name": path, "label": label, "image": image}

    def _indices(self, count: int) -> np.ndarray:
        """The frames of each clip, (clips, T), of a video with `count` frames."""
        room = max(count - 1 - int(self._offsets[-1]), 0)
        if self._is_train:
            starts = np.array([random.randint(0, room)])
        elif self._clips == 1:
            starts = np.array([room // 2])
        else:
            starts = np.linspace(0, room, self._clips).round().astype(int)
        return (starts[:, None] + self._offsets).clip(max=count - 1)

    def _clip(self, pixels: Tensor, places: Sequence[int]) -> Tensor:
        return pixels[list(places)].transpose(0, 1).contiguous()


def _frame_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)


def _open(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise InputError(f'{path} is a video: run pip install "gn_det[video]"') from None
    try:
        container = av.open(str(path))
    except (OSError, ValueError) as error:  # PyAV's errors are subclasses of these
        raise InputError(f"{path} cannot be read as a video: {error}") from None
    if not container.streams.video:
        raise InputError(f"{path} has no video stream")
    return container


def count_frames(path: Path) -> int:
    """Number of frames of a clip, a folder of frames or a video file.

    Raises:
        InputError: if there are none, or the video cannot be read.
    """
    if path.is_dir():
        count = len(_frame_files(path))
    else:
        with _open(path) as container:
            stream = container.streams.video[0]
            # Some formats do not record it
            count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if not count:
        raise InputError(f"{path} has no frames")
    return count


def read_frames(path: Path, indices: Sequence[int]) -> dict[int, np.ndarray]:
    """Read frames of a clip.

    Args:
        path: a folder of frames, in the order of their names, or a video file.
        indices: increasing.

    Returns:
        index -> uint8 (H, W, 3), RGB. If a video ends too early, its last frame is repeated.

    Raises:
        InputError: for frames that cannot be read.
    """
    if path.is_dir():
        files = _frame_files(path)
        return {index: read_image(files[index]) for index in indices}
    wanted, found, last = {*indices}, {}, None
    with _open(path) as container:
        try:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    last = found[index] = frame.to_ndarray(format="rgb24")
                if index >= indices[-1]:
                    break
        except (OSError, ValueError) as error:
            if last is None:
                raise InputError(f"{path} cannot be read as a video: {error}") from None
    if last is None:
        raise InputError(f"{path} has no frame {indices[0]}")
    return {index: found.get(index, last) for index in indices}
