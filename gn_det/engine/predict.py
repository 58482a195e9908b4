"""Inference with a trained model on images: `gn-det predict` and `tools/predict.py`."""

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO

from ..check.layers import BUILD_ERRORS
from ..check.machine import check_machine
from ..checkpoint.checkpointer import StrictCheckpointer
from ..config import default_device
from ..config_file import read_config
from ..data.image_files import read_image
from ..data.unlabelled_images import find_images
from ..errors import InputError, exit_on_input_error, printable
from ..evaluation.figures import MIN_SCORE, draw
from ..evaluation.markdown import one_line
from ..files import write_whole
from ..modeling import build_on_meta_device
from ..plain_yaml import CONFIG_ERRORS, describe_error
from .run_record import RECORD

MAX_RECORD = 10 * 2**20  # bytes of run.json
# Images between two writes of the results
SAVE_PERIOD = 100
# File systems allow names of 255 bytes
MAX_STEM = 60


class Predictor(DefaultPredictor):
    """Detectron2's `DefaultPredictor`, with strict loading of the weights.

    Args:
        cfg: a config with gn_det's keys.

    Raises:
        InputError: if `MODEL.WEIGHTS` does not fill all tensors of the model.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.model = build_model(cfg).eval()
        StrictCheckpointer(self.model, complete=True).load(cfg.MODEL.WEIGHTS)
        self.aug = ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        self.input_format = cfg.INPUT.FORMAT


def load_run(
    folder: Path, output: Path, opts: Sequence[str]
) -> tuple[CfgNode, list[dict[str, Any]]]:
    """Load the config and categories of a finished run.

    Args:
        folder: `OUTPUT_DIR` of the run.
        output: `OUTPUT_DIR` of the returned config.
        opts: `KEY VALUE` overrides.

    Returns:
        the config, with `MODEL.WEIGHTS` set to the final weights; and the categories, as dicts with
        `id` and `name`.

    Raises:
        InputError: if the folder is not that of a finished run, or a file in it is invalid.
    """
    for name in ("config.yaml", "model_final.pth", RECORD):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}: name the OUTPUT_DIR of a finished training run"
            )
    device = default_device()
    keys = ["MODEL.WEIGHTS", str(folder / "model_final.pth"), "MODEL.DEVICE", device]
    # The datasets of the run may not exist on this machine
    keys += ["OUTPUT_DIR", str(output), "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    config = str(folder / "config.yaml")
    cfg = read_config(config, [*keys, *opts])
    check_model(cfg, folder)
    return cfg, read_categories(folder / RECORD, cfg)


def check_model(cfg: CfgNode, folder: Path) -> None:
    """Refuse a config whose model cannot be built or is larger than its weights file.

    Args:
        cfg: the config.
        folder: the folder of `config.yaml` and `model_final.pth`.

    Raises:
        InputError: the message names `config.yaml`.
    """
    config = folder / "config.yaml"
    if (name := cfg.MODEL.PROPOSAL_GENERATOR.NAME) == "PrecomputedProposals":
        raise InputError(f"{config}: MODEL.PROPOSAL_GENERATOR.NAME {name} is not supported")
    try:
        model = build_on_meta_device(cfg)
    except (*BUILD_ERRORS, *CONFIG_ERRORS) as error:
        raise InputError(f"{config}: the model cannot be built: {describe_error(error)}") from None
    # A config could ask for more memory than there is
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    count = max(count, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    if count > (folder / "model_final.pth").stat().st_size:
        raise InputError(f"{config}: the model has {count} values, more than model_final.pth has")


def read_categories(record: Path, cfg: CfgNode) -> list[dict[str, Any]]:
    """Read the categories from the `run.json` of a run.

    Args:
        record: path of the file.
        cfg: the config of the model.

    Returns:
        categories as dicts with `id` and `name`; named "class 0", "class 1" and so on if the file
        has none.

    Raises:
        InputError: for a file that is invalid or does not match the config.
    """
    try:
        if record.stat().st_size > MAX_RECORD:
            raise ValueError(f"it has more than {MAX_RECORD} bytes")
        content = json.loads(record.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        categories = content.get("categories")
        if categories is None or categories == []:
            return [{"id": i, "name": f"class {i}"} for i in range(count)]
        if not isinstance(categories, list) or not all(map(is_category, categories)):
            raise ValueError(
                "its categories are not a list of objects with id (0 or larger) and name"
            )
        if len({category["id"] for category in categories}) < len(categories):
            raise ValueError("two of its categories have the same id")
        # Other architectures have their own key for the number of classes
        if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and len(categories) != count:
            raise ValueError(
                f"it has {len(categories)} categories, but the model of config.yaml has {count}"
            )
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{record} cannot be used: {describe_error(error)}") from None
    return [{"id": category["id"], "name": one_line(category["name"])} for category in categories]


def is_category(value: object) -> bool:
    """Whether a value is a category in COCO format."""
    return (
        isinstance(value, dict)
        and type(value.get("id")) is int
        and value["id"] >= 0
        and isinstance(value.get("name"), str)
    )


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
