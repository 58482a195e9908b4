"""Export of a trained model to other runtimes: `gn-det export` and `tools/export_model.py`."""

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..check.machine import check_machine
from ..data.image_files import read_image
from ..data.unlabelled_images import find_images
from ..errors import InputError, exit_on_input_error
from ..files import incomplete, remove
from ..modeling.exportable import exportable, output_names, tensors_of
from .export_formats import FORMATS, Format
from .predictor import Predictor, load_run

# So many of the given images are used
MAX_IMAGES = 10
# The first image is used at these shares of its height and width as well
OTHER_SIZES = ((0.75, 0.75), (1.0, 0.6))
# Largest differences from the original: pixels, and probabilities
TOLERANCES = {"boxes": 0.1, "scores": 1e-3, "masks": 1e-2}
# Share of the detections that may differ: rounding decides which of two boxes of nearly equal score
# is suppressed
BORDERLINE = 0.05


def export(
    cfg: CfgNode,
    categories: list[dict[str, Any]],
    target: Format,
    images: Sequence[np.ndarray],
    folder: Path,
) -> Path:
    """Write a trained model in another format, once its results equal the original's.

    Args:
        cfg, categories: of the model, as `load_run` returns them.
        target: the format.
        images: RGB, uint8 of shape (H, W, 3), on which the results are compared.
        folder: the folder to write to.

    Returns:
        the path of the model's file.

    Raises:
        InputError: if the model cannot be exported, or the results differ; nothing is written.
    """
    path = folder / target.file
    draft = incomplete(path)
    draft.mkdir()
    try:
        # No score is above 1
        _export_checked(_with_threshold(cfg, 1.0), categories, target, images[:1], draft)
        _export_checked(cfg, categories, target, images, draft)
        for file in draft.iterdir():
            os.replace(file, folder / file.name)
    finally:
        remove(draft)
    return path


def _with_threshold(cfg: CfgNode, threshold: float) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    return cfg


def _export_checked(
    cfg: CfgNode,
    categories: list[dict[str, Any]],
    target: Format,
    images: Sequence[np.ndarray],
    folder: Path,
) -> None:
    """Write the model to a folder, and compare it with the original."""
    predictor = Predictor(cfg)
    inputs = [network_input(predictor, image) for image in images]
    for share in OTHER_SIZES:
        size = [int(side * part) for side, part in zip(inputs[0].shape[1:], share, strict=True)]
        inputs.append(nn.functional.interpolate(inputs[0][None], size)[0])
    with torch.no_grad():
        expected = [predictor.model.inference([{"image": x}], None, False)[0] for x in inputs]
    try:
        module = exportable(predictor.model, inputs[0])
    except ImportError as error:
        fix = "install Detectron2's official main, or run tools/install_detectron2.py"
        raise InputError(f"detectron2.export cannot be imported: {error}", fix=fix) from None
    path = folder / target.file
    with warnings.catch_warnings():
        # A trace holds for other inputs if its results are the original's, which is tested below
        warnings.simplefilter("ignore")
        target.save(module, inputs[0], path, metadata(cfg, categories))
    exported, names = target.load(path), output_names(cfg)
    threshold = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
    total = different = 0
    worst = ""
    for number, (image, instances) in enumerate(zip(inputs, expected, strict=True), start=1):
        title = f"image {number}, {image.shape[2]}x{image.shape[1]}, scores above {threshold:g}"
        found = dict(zip(names, map(torch.as_tensor, exported(image)), strict=True))
        wrong, text = _compare(tensors_of(instances), found)
        print(f"{title}: {text}", flush=True)
        total, different = total + len(instances), different + wrong
        worst = worst or f"{title}: {text}" * bool(wrong)
    if different > BORDERLINE * total:
        raise InputError(f"{different} of {total} detections differ from the original's: {worst}")


def metadata(cfg: CfgNode, categories: list[dict[str, Any]]) -> dict[str, Any]:
    """What a program has to know in order to use an exported model.

    Inputs are resized to `min_size` and `max_size`, as by Detectron2's `ResizeShortestEdge`, and
    have values from 0 to 255: the model itself applies `pixel_mean` and `pixel_std`.
    """
    return {
        "categories": categories,
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        "outputs": output_names(cfg),
    }


def network_input(predictor: Predictor, image: np.ndarray) -> Tensor:
    """The model's input for an RGB image, (3, H, W) and float32, on the model's device."""
    if predictor.input_format == "BGR":
        image = image[..., ::-1]
    image = predictor.aug.get_transform(image).apply_image(np.ascontiguousarray(image))
    tensor = torch.as_tensor(image.astype("float32").transpose(2, 0, 1))
    return tensor.to(predictor.cfg.MODEL.DEVICE)


def _compare(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[int, str]:
    """Number of detections in an image that differ, and a description."""
    expected, found = ({n: t.cpu() for n, t in some.items()} for some in (expected, found))
    count, other = len(expected["scores"]), len(found["scores"])
    if not count or not other:
        text = f"{other} objects instead of {count}" if count or other else "no objects, as before"
        return max(count, other), text
    order = _nearest(expected, found)
    differences = {
        name: (found[name][order] - expected[name]).abs().reshape(count, -1).amax(1)
        for name in TOLERANCES
        if name in expected
    }
    right = found["classes"][order] == expected["classes"]
    for name, difference in differences.items():
        right &= difference <= TOLERANCES[name]
    wrong = max(count, other) - len(set(order[right].tolist()))
    details = ", ".join(f"{name} {d.max():.1g}" for name, d in differences.items())
    return wrong, f"{count} objects, {wrong} of them different; largest differences: {details}"


def _nearest(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Tensor:
    """For each expected detection the index of the nearest found one: equal scores may swap."""

    def points(tensors: dict[str, Tensor]) -> Tensor:
        scores, classes = tensors["scores"][:, None], tensors["classes"][:, None]
        return torch.cat([tensors["boxes"], 100 * scores, 1000 * classes], dim=1)

    return torch.cdist(points(expected), points(found), p=1).argmin(dim=1)


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command-line arguments; defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: with a message, for an `InputError`.
    """
    args = _parse(argv)
    with exit_on_input_error():
        target = FORMATS[args.format]
        target.check(args.format)
        folder = args.output_dir or args.model
        opts = ["MODEL.DEVICE", "cpu", "MODEL.GROUP_NORM.IMPL", "fused", *args.opts]
        cfg, categories = load_run(args.model, folder, opts)
        check_exportable(cfg)
        check_machine(cfg)
        paths = find_images(args.images)
        step = -(-len(paths) // MAX_IMAGES)
        path = export(cfg, categories, target, [*map(read_image, paths[::step])], folder)
        print(f"{path}: as the original on these images, at other sizes and without detections")


def check_exportable(cfg: CfgNode) -> None:
    """Raise an `InputError` for a model that has other results than boxes and masks."""
    for key, value, fix in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, "GeneralizedRCNN"),
        ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON, False),
        ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS, False),
    ):
        if value != fix:
            raise InputError(f"{key} {value} cannot be exported: only {fix} can", key=key)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Export a trained model to TorchScript, ONNX or OpenVINO, and compare its "
        "results with the original's.",
        epilog="example:\n  %(prog)s --model output/compare/best --format onnx mine/images",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    help_ = "OUTPUT_DIR of a finished training run, or output/compare/best (required)"
    add("--model", type=Path, required=True, metavar="FOLDER", help=help_)
    help_ = f"one of {', '.join(FORMATS)} (required)"
    add("--format", required=True, choices=FORMATS, metavar="FORMAT", help=help_)
    help_ = f"image files and folders of images to compare on; up to {MAX_IMAGES} are used"
    add("images", type=Path, nargs="+", metavar="IMAGES", help=help_)
    help_ = "folder for the exported model (default: that of --model)"
    add("--output-dir", type=Path, metavar="FOLDER", help=help_)
    help_ = "KEY VALUE overrides of the config, at the end of the command (default: none)"
    add("--opts", nargs=argparse.REMAINDER, default=[], help=help_)
    return parser.parse_args(argv)
