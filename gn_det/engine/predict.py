"""Inference with a trained model on images: `gn-det predict` and `tools/predict.py`."""

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from PIL import Image
from pycocotools.coco import COCO

from ..check.machine import check_machine
from ..data.image_files import read_image
from ..data.unlabelled_images import find_images
from ..errors import InputError, exit_on_input_error, printable
from ..evaluation.figures import MIN_SCORE, draw
from ..files import write_whole
from .predictor import Predictor, load_run

# Images between two writes of the results
SAVE_PERIOD = 100
# File systems allow names of 255 bytes
MAX_STEM = 60


def predict(
    predictor: Predictor, image: np.ndarray, number: int, categories: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Detect the objects in an image.

    Args:
        predictor: the model.
        image: RGB, uint8 of shape (H, W, 3).
        number: the `image_id` of the results.
        categories: in the order of the model's class indices.

    Returns:
        results in COCO format, with the keys `image_id`, `category_id`, `bbox` (XYWH, in pixels),
        `score`, and `segmentation` (RLE) if the model predicts masks.
    """
    # DefaultPredictor expects BGR for every INPUT.FORMAT, and converts it
    instances = predictor(np.ascontiguousarray(image[..., ::-1]))["instances"].to("cpu")
    results = instances_to_coco_json(instances, number)
    for result in results:
        result["category_id"] = categories[result["category_id"]]["id"]
    return results


def as_coco(image: np.ndarray, number: int, categories: list[dict[str, Any]]) -> COCO:
    """A pycocotools dataset with a single image, its categories and no annotations.

    Args:
        image: array of shape (H, W, 3).
        number: the `image_id`.
        categories: dicts with `id` and `name`.
    """
    dataset = COCO()
    size = {"height": image.shape[0], "width": image.shape[1]}
    dataset.dataset = {"images": [{"id": number, **size}], "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        dataset.createIndex()
    return dataset


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command-line arguments; defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: with a message, for an `InputError`.
    """
    args = _parse(argv)
    with exit_on_input_error():
        cfg, categories = load_run(args.model, args.output_dir, args.opts)
        check_machine(cfg)
        paths, predictor = find_images(args.images), Predictor(cfg)
        results: list[dict[str, Any]] = []
        unreadable = 0
        try:
            for number, path in enumerate(paths, start=1):
                try:
                    image = read_image(path)
                except InputError as error:
                    print(error)
                    unreadable += 1
                    continue
                detections = predict(predictor, image, number, categories)
                results += [{**result, "file_name": str(path)} for result in detections]
                shown = [result for result in detections if result["score"] >= args.min_score]
                drawn = draw(image, shown, as_coco(image, number, categories))
                target = args.output_dir / f"{number:05}_{path.stem[:MAX_STEM]}.jpg"
                Image.fromarray(drawn).save(target, quality=90)
                print(f"{printable(str(target), 1000)}: {len(shown)} objects", flush=True)
                if number % SAVE_PERIOD == 0:
                    save_results(results, args.output_dir)
        finally:
            # An interruption or a full disk does not lose what was found before
            path = save_results(results, args.output_dir)
        print(f"{path}: {len(results)} objects of any score")
        if unreadable:
            raise InputError(f"{unreadable} of {len(paths)} files could not be read, see above")


def save_results(results: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write COCO results to `coco_instances_results.json` in a folder, and return its path."""
    path = folder / "coco_instances_results.json"
    with write_whole(path) as file:
        file.write(json.dumps(results) + "\n")
    return path


def score(word: str) -> float:
    """Parse a score of the command line, from 0 to 1."""
    if not 0 <= (number := float(word)) <= 1:
        raise ValueError(word)
    return number


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Detect objects in images with a trained model; draw them and write them in "
        "COCO format.",
        epilog="example:\n  %(prog)s --model output/compare/best mine/images",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    help_ = "OUTPUT_DIR of a finished training run, or output/compare/best (required)"
    add("--model", type=Path, required=True, metavar="FOLDER", help=help_)
    add("images", type=Path, nargs="+", metavar="IMAGES", help="image files and folders of images")
    help_ = "folder for the drawn images and coco_instances_results.json (default: %(default)s)"
    add("--output-dir", type=Path, default=Path("output/predictions"), metavar="FOLDER", help=help_)
    help_ = "smallest score of drawn objects, from 0 to 1 (default: %(default)s)"
    add("--min-score", type=score, default=MIN_SCORE, metavar="S", help=help_)
    help_ = "KEY VALUE overrides of the config, at the end of the command (default: none)"
    add("--opts", nargs=argparse.REMAINDER, default=[], help=help_)
    return parser.parse_args(argv)
