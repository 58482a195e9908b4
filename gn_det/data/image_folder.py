"""Folders of pictures, one sub-folder a class (torchvision's ImageFolder), as Detectron2's loaders.

In the place of a registered name, `DATASETS.TRAIN` and `DATASETS.TEST` have the path of a folder,
as it stands or below `$DETECTRON2_DATASETS` (default `./datasets`).
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

from ..errors import InputError
from .image_files import read_image
from .loader import TrainLoader


class UnreadableImageError(InputError):
    """A picture that cannot be decoded, told in one sentence."""

    def __init__(self, text: str) -> None:
        # PyTorch hands an error of a loader's process over as the text of its whole traceback,
        # which ends with the name of this class and the sentence
        super().__init__(text.strip().rpartition(f"{type(self).__name__}: ")[2])


# Detectron2's trainer asks for its loaders by config alone, and listing ImageNet takes a while
@functools.cache
def read_folder(name: str) -> ImageFolder:
    """The pictures and classes of a folder; a class may be without pictures.

    Raises:
        InputError: if there is no such folder, or it holds no class folders, or no pictures.
    """
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
    paths = [Path(name).expanduser(), root / name]
    path = next((path for path in paths if path.is_dir()), None)
    if path is None:
        raise InputError(
            f"there is no folder {' or '.join(map(str, dict.fromkeys(paths)))}: DATASETS.TRAIN and "
            "DATASETS.TEST name folders of pictures, with one sub-folder for each class"
        )
    try:
        folder = ImageFolder(str(path), allow_empty=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be used ({error}): it must hold a folder of pictures for each class"
        ) from None
    if not folder.samples:
        raise InputError(f"the class folders of {path} hold no pictures")
    return folder


class ImageMapper:
    """From a sample of `ImageFolder` to Detectron2's record of a picture.

    Training pictures are a random part, of `PRETRAIN.MIN_CROP_AREA` to all of the area, flipped
    half of the time, with brightness, contrast and saturation changed by up to 40%. Test pictures
    are scaled to a shorter side of 256/224 times the size, of which they keep the centre.
    """

    def __init__(self, cfg: CfgNode, is_train: bool) -> None:
        self._bgr = cfg.INPUT.FORMAT == "BGR"
        side = cfg.PRETRAIN.IMAGE_SIZE
        steps = [T.Resize(round(side * 256 / 224)), T.CenterCrop(side)]
        if is_train:
            colours = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
            part = T.RandomResizedCrop(side, scale=(cfg.PRETRAIN.MIN_CROP_AREA, 1.0))
            steps = [part, T.RandomHorizontalFlip(), colours]
        self._transform = T.Compose([*steps, T.PILToTensor()])

    def __call__(self, sample: tuple[str, int]) -> dict[str, Any]:
        """A record: "file_name", "label", and "image", uint8 (3, side, side) in `INPUT.FORMAT`.

        Raises:
            UnreadableImageError: for a file that is no picture.
        """
        path, label = sample
        try:
            picture = Image.fromarray(read_image(Path(path)))
        except InputError as error:
            raise UnreadableImageError(str(error)) from None
        image = self._transform(picture)
        return {"file_name": path, "label": label, "image": image.flip(0) if self._bgr else image}


def build_train_loader(cfg: CfgNode) -> TrainLoader:
    """Endless shuffled batches of `SOLVER.IMS_PER_BATCH` pictures in all, as lists of records."""
    return TrainLoader(
        read_folder(cfg.DATASETS.TRAIN[0]).samples,
        ImageMapper(cfg, is_train=True),
        lambda samples: TrainingSampler(len(samples)),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        group_by_shape=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """Every picture of a folder once, dealt out to the processes, as lists of records."""
    samples = read_folder(name).samples
    # Detectron2's own test loader takes one picture at a time in its release 0.6
    return DataLoader(
        MapDataset(samples, ImageMapper(cfg, is_train=False)),
        batch_size=max(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), 1),
        sampler=InferenceSampler(len(samples)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
    )
