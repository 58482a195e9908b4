"""Data loaders for classification, on folders of images or clips with one sub-folder per class.

Instead of a registered name, `DATASETS.TRAIN` and `DATASETS.TEST` give the path of a folder, either
as it is or relative to `$DETECTRON2_DATASETS` (default `./datasets`). The layout is that of
torchvision's `ImageFolder`.
"""

import functools
import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MapDataset
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from ..config import is_clips
from ..errors import InputError
from .clips import ClipMapper, list_clips
from .image_files import UnreadableImageError, read_image
from .loader import TrainLoader
from .worker_limits import sharing_workers


# Cached, since each loader calls this, and listing ImageNet takes a while
@functools.cache
def read_folder(name: str, clips: bool = False) -> ImageFolder:
    """List the images or clips and the classes of a folder; class folders may be empty.

    Args:
        name: path of the folder, as it is or relative to `$DETECTRON2_DATASETS`.
        clips: whether it has clips, as in `list_clips`.

    Raises:
        InputError: if the folder does not exist, or has no class folders or no images.
    """
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
    paths = [Path(name).expanduser(), root / name]
    path = next((path for path in paths if path.is_dir()), None)
    if path is None:
        raise InputError(
            f"there is no folder {' or '.join(map(str, dict.fromkeys(paths)))}: DATASETS.TRAIN and "
            "DATASETS.TEST must name image folders with one sub-folder per class"
        )
    try:
        folder = list_clips(path) if clips else ImageFolder(str(path), allow_empty=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be used ({error}): it must have one folder of images per class"
        ) from None
    if not folder.samples:
        raise InputError(f"the class folders of {path} have no {'clips' if clips else 'images'}")
    return folder


class ImageMapper:
    """Map a sample of torchvision's `ImageFolder` to a dict in Detectron2's format.

    Training images get a random resized crop of `PRETRAIN.MIN_CROP_AREA` to all of the area, a
    random horizontal flip, and random brightness, contrast and saturation within 40%.
    Test images are resized to a shorter side of 256/224 `PRETRAIN.IMAGE_SIZE` and center-cropped.

    Args:
        cfg: gives `INPUT.FORMAT`, `PRETRAIN.IMAGE_SIZE` and `PRETRAIN.MIN_CROP_AREA`.
        is_train: whether to augment.
    """

    def __init__(self, cfg: CfgNode, is_train: bool) -> None:
        self._bgr = cfg.INPUT.FORMAT == "BGR"
        side = cfg.PRETRAIN.IMAGE_SIZE
        steps = [T.Resize(round(side * 256 / 224)), T.CenterCrop(side)]
        if is_train:
            jitter = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
            crop = T.RandomResizedCrop(side, scale=(cfg.PRETRAIN.MIN_CROP_AREA, 1.0))
            steps = [crop, T.RandomHorizontalFlip(), jitter]
        self._transform = T.Compose([*steps, T.PILToTensor()])

    def __call__(self, sample: tuple[str, int]) -> dict[str, Any]:
        """Load and transform an image.

        Args:
            sample: path and class index.

        Returns:
            "file_name", "label", and "image", a uint8 tensor (3, side, side) in `INPUT.FORMAT`.

        Raises:
            UnreadableImageError: if the file cannot be read as an image.
        """
        path, label = sample
        try:
            pixels = read_image(Path(path))
        except InputError as error:
            raise UnreadableImageError(str(error)) from None
        image = self._transform(Image.fromarray(pixels))
        return {"file_name": path, "label": label, "image": image.flip(0) if self._bgr else image}


def _mapper(cfg: CfgNode, is_train: bool) -> ImageMapper | ClipMapper:
    return ClipMapper(cfg, is_train) if is_clips(cfg) else ImageMapper(cfg, is_train)


def build_train_loader(cfg: CfgNode) -> TrainLoader:
    """Build the training loader for `DATASETS.TRAIN[0]`.

    Returns:
        endless shuffled batches, lists of the dicts of `ImageMapper`. A batch has
        `SOLVER.IMS_PER_BATCH` images over all processes.
    """
    return TrainLoader(
        read_folder(cfg.DATASETS.TRAIN[0], is_clips(cfg)).samples,
        _mapper(cfg, is_train=True),
        lambda samples: TrainingSampler(len(samples)),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        group_by_shape=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """Build a test loader, which divides the images of a folder among the processes.

    Args:
        cfg: gives the batch size over all processes, `SOLVER.IMS_PER_BATCH`.
        name: path of the folder, as `read_folder` takes it.

    Returns:
        each image once, as batches that are lists of the dicts of `ImageMapper`.
    """
    samples = read_folder(name, is_clips(cfg)).samples
    # Detectron2 0.6's own test loader only supports batches of one image
    return DataLoader(
        MapDataset(samples, _mapper(cfg, is_train=False)),
        batch_size=max(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), 1),
        sampler=InferenceSampler(len(samples)),
        num_workers=sharing_workers(cfg.DATALOADER.NUM_WORKERS),
        collate_fn=list,
    )
