"""Pretraining of a backbone by classifying object crops, in the place of ImageNet."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter
from PIL import Image
from torch import Tensor, nn

from ..check import check_config
from ..errors import InputError, exit_on_input_error
from ..modeling import CropClassifier
from ..solver import set_norm_weight_decay
from .train import check_inputs, read_config, setup

CHECKPOINT = "backbone.pth"


def load_crops(dataset: str, side: int, image_format: str) -> tuple[Tensor, Tensor]:
    """Every object of a data set as a square crop, 1.2 to 2 times its size.

    Returns:
        uint8 crops of shape (N, 3, side, side), and their N labels. Crowds are left out.
    """
    rng = np.random.default_rng(0)
    crops, labels = [], []
    for record in DatasetCatalog.get(dataset):
        picture = Image.fromarray(read_image(record["file_name"], image_format))
        for annotation in record["annotations"]:
            if annotation.get("iscrowd"):
                continue
            x, y, width, height = annotation["bbox"]
            half = rng.uniform(0.6, 1.0) * max(width, height)
            x, y = x + width / 2, y + height / 2
            square = (x - half, y - half, x + half, y + half)
            crop = picture.transform(
                (side, side), Image.Transform.EXTENT, square, Image.Resampling.BILINEAR
            )
            crops.append(np.asarray(crop).transpose(2, 0, 1))
            labels.append(annotation["category_id"])
    return torch.from_numpy(np.stack(crops)), torch.tensor(labels)


def batches(crops: Tensor, labels: Tensor, size: int, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches of `side` x `side` windows of the crops, half of them flipped."""
    slack = crops.shape[-1] - side
    while True:
        for chosen in torch.randperm(len(crops)).split(size)[: len(crops) // size]:
            x, y = torch.randint(slack + 1, (2,)).tolist()
            window = crops[chosen, :, y : y + side, x : x + side]
            flipped = torch.where(torch.rand(size, 1, 1, 1) < 0.5, window, window.flip(-1))
            yield flipped, labels[chosen]


@torch.no_grad()
def top1(model: CropClassifier, crops: Tensor, labels: Tensor) -> float:
    """Share of crops, in percent, whose highest score is that of their label."""
    model.eval()
    guesses = torch.cat([model.logits(part).argmax(dim=1).cpu() for part in crops.split(64)])
    return 100 * (guesses == labels).float().mean().item()


def save_backbone(backbone: nn.Module, path: Path) -> None:
    """Write a backbone's weights as Detectron2 takes them for `MODEL.WEIGHTS`, all or nothing.

    `matching_heuristics` makes Detectron2 find `backbone.bottom_up.` and the like by itself.
    """
    partial = path.with_suffix(".partial")
    content = {"model": backbone.state_dict(), "__author__": "gn_det", "matching_heuristics": True}
    torch.save(content, partial)
    os.replace(partial, path)


def pretrain(cfg: CfgNode) -> float:
    """Train a backbone and write it to `OUTPUT_DIR/backbone.pth`.

    The keys have their usual meaning: `DATASETS.TRAIN` and `TEST` name the data sets that crops are
    taken from, `INPUT.MIN_SIZE_TRAIN` is the crops' side in pixels, and `SOLVER` the schedule.

    Returns:
        top-1 accuracy in percent on the crops of `DATASETS.TEST`.

    Raises:
        InputError: if there are fewer crops than one batch takes.
    """
    side = cfg.INPUT.MIN_SIZE_TRAIN[0]
    model = build_model(cfg)
    # The paper decays gamma and beta on ImageNet (Section 4.1), and not in detection
    optimizer = set_norm_weight_decay(build_optimizer(cfg, model), model, cfg.SOLVER.WEIGHT_DECAY)
    crops, labels = load_crops(cfg.DATASETS.TRAIN[0], side + side // 8, cfg.INPUT.FORMAT)
    if len(crops) < cfg.SOLVER.IMS_PER_BATCH:
        raise InputError(
            f"{cfg.DATASETS.TRAIN[0]} has {len(crops)} objects, fewer than SOLVER.IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH}: take a larger data set or a smaller batch"
        )
    trainer = SimpleTrainer(
        model, batches(crops, labels, cfg.SOLVER.IMS_PER_BATCH, side), optimizer
    )
    metrics = os.path.join(cfg.OUTPUT_DIR, "metrics.json")
    writers = [CommonMetricPrinter(cfg.SOLVER.MAX_ITER), JSONWriter(metrics)]
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
            hooks.PeriodicWriter(writers, period=20),
        ]
    )
    trainer.train(0, cfg.SOLVER.MAX_ITER)
    accuracy = top1(model, *load_crops(cfg.DATASETS.TEST[0], side, cfg.INPUT.FORMAT))
    with EventStorage(cfg.SOLVER.MAX_ITER) as storage:
        storage.put_scalar("top1", accuracy)
        JSONWriter(metrics).write()
    logging.getLogger(__name__).info(f"Top-1 accuracy on {cfg.DATASETS.TEST[0]}: {accuracy:.1f}%")
    save_backbone(model.backbone, Path(cfg.OUTPUT_DIR) / CHECKPOINT)
    return accuracy


def run(argv: Sequence[str] | None = None) -> None:
    """The whole of `tools/pretrain.py`: a config and `KEY VALUE` overrides, one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        cfg = read_config(args)
        check_config(cfg)
        check_inputs(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        if cfg.SOLVER.ACCUMULATE_ITERS > 1:
            raise InputError("SOLVER.ACCUMULATE_ITERS is for detectors: set it to 1")
        pretrain(setup(args))


if __name__ == "__main__":
    run()
