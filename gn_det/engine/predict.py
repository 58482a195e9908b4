"""What a trained model finds in pictures: drawn, and as COCO results.

MODEL is the OUTPUT_DIR of a training, or a comparison's `best`. IMAGES are files or folders.
"""

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
from ..data.unlabelled_images import is_image
from ..errors import InputError, exit_on_input_error, printable
from ..evaluation.figures import MIN_SCORE, draw
from ..evaluation.markdown import one_line
from ..files import write_whole
from ..modeling import build_without_memory
from ..plain_yaml import CONFIG_ERRORS, in_words
from .run_record import RECORD

MAX_RECORD = 10 * 2**20  # bytes of run.json


class Predictor(DefaultPredictor):
    """Detectron2's, with strict loading of its weights.

    Args:
        cfg: `MODEL.WEIGHTS` must fill all of the model.

    Raises:
        InputError: on weights that do not.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.model = build_model(cfg).eval()
        StrictCheckpointer(self.model, whole=True).load(cfg.MODEL.WEIGHTS)
        self.aug = ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        self.input_format = cfg.INPUT.FORMAT


def load_run(
    folder: Path, output: Path, opts: Sequence[str]
) -> tuple[CfgNode, list[dict[str, Any]]]:
    """A finished training's config with its own weights, and its categories.

    Args:
        folder: its `OUTPUT_DIR`.
        output: the `OUTPUT_DIR` of what is done with it.
        opts: `KEY VALUE` pairs that override the config.

    Raises:
        InputError: if the folder is none of a finished training, or a file in it makes no sense.
    """
    for name in ("config.yaml", "model_final.pth", RECORD):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}: give the OUTPUT_DIR of a training that came to its end"
            )
    device = default_device()
    keys = ["MODEL.WEIGHTS", str(folder / "model_final.pth"), "MODEL.DEVICE", device]
    # What the training had may lie on another machine
    keys += ["OUTPUT_DIR", str(output), "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    config = str(folder / "config.yaml")
    cfg = read_config(config, [*keys, *opts])
    check_model(cfg, folder)
    return cfg, read_categories(folder / RECORD, cfg)


def check_model(cfg: CfgNode, folder: Path) -> None:
    """Refuse a config whose model cannot be built, or that the weights beside it cannot fill.

    Raises:
        InputError: naming the config.
    """
    config = folder / "config.yaml"
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        raise InputError(f"{config}: MODEL.PROPOSAL_GENERATOR needs proposals, and there are none")
    try:
        model = build_without_memory(cfg)
    except (*BUILD_ERRORS, *CONFIG_ERRORS) as error:
        raise InputError(f"{config}: the model cannot be built: {in_words(error)}") from None
    # Before it takes all the memory that there is
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    count = max(count, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    if count > (folder / "model_final.pth").stat().st_size:
        raise InputError(f"{config}: the model has {count} values, more than model_final.pth holds")


def read_categories(record: Path, cfg: CfgNode) -> list[dict[str, Any]]:
    """The categories in a training's `run.json`, or numbers for names where it has none.

    Raises:
        InputError: for a file that is not such a record, or does not fit the config.
    """
    try:
        if record.stat().st_size > MAX_RECORD:
            raise ValueError(f"it has more than {MAX_RECORD} bytes")
        content = json.loads(record.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        found = content.get("categories")
        if found is None or found == []:
            return [{"id": i, "name": f"class {i}"} for i in range(count)]
        if not isinstance(found, list) or not all(map(is_category, found)):
            raise ValueError("its categories are not a list of ids, from 0 on, and names")
        if len({category["id"] for category in found}) < len(found):
            raise ValueError("two of its categories have the same id")
        # Other architectures count their classes under keys of their own
        if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and len(found) != count:
            raise ValueError(f"it has {len(found)} categories, the model of config.yaml {count}")
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{record} cannot be used: {in_words(error)}") from None
    return [{"id": category["id"], "name": one_line(category["name"])} for category in found]


def is_category(value: object) -> bool:
    """Whether a value is a category as COCO has them."""
    return (
        isinstance(value, dict)
        and type(value.get("id")) is int
        and value["id"] >= 0
        and isinstance(value.get("name"), str)
    )


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the pictures in the folders among them.

    Raises:
        InputError: for what does not exist, and if there is no picture at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if path.is_dir():
            found += filter(is_image, sorted(path.rglob("*")))
        else:
            found.append(path)
    if not found:
        raise InputError(f"there are no pictures in {', '.join(map(str, paths))}")
    return found


def predict(
    predictor: Predictor, picture: np.ndarray, number: int, categories: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Find the objects in a picture.

    Args:
        picture: uint8 of shape (H, W, 3), RGB.
        number: becomes `image_id`.
        categories: in the order of the model's outputs.

    Returns:
        COCO results: `image_id`, `category_id`, `bbox`, `score`, and `segmentation` where the model
        has masks.
    """
    # BGR whatever INPUT.FORMAT is, which is applied to it
    found = predictor(np.ascontiguousarray(picture[..., ::-1]))["instances"].to("cpu")
    results = instances_to_coco_json(found, number)
    for result in results:
        result["category_id"] = categories[result["category_id"]]["id"]
    return results


def as_coco(picture: np.ndarray, number: int, categories: list[dict[str, Any]]) -> COCO:
    """A single picture and the categories, as pycocotools has them."""
    listed = COCO()
    size = {"height": picture.shape[0], "width": picture.shape[1]}
    listed.dataset = {"images": [{"id": number, **size}], "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        listed.createIndex()
    return listed


def run(argv: Sequence[str] | None = None) -> None:
    """The whole of `tools/predict.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="MODEL")
    add("images", type=Path, nargs="+", metavar="IMAGES")
    add("--output-dir", type=Path, default=Path("output/predictions"), metavar="FOLDER")
    help_ = f"least score of what is drawn, from 0 to 1 (default {MIN_SCORE})"
    add("--min-score", type=float, default=MIN_SCORE, metavar="S", help=help_)
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        cfg, categories = load_run(args.model, args.output_dir, args.opts)
        check_machine(cfg)
        pictures, predictor = find_images(args.images), Predictor(cfg)
        results, unread = [], 0
        for number, path in enumerate(pictures, start=1):
            try:
                picture = read_image(path)
            except InputError as error:
                print(error)
                unread += 1
                continue
            found = predict(predictor, picture, number, categories)
            results += [{**result, "file_name": str(path)} for result in found]
            shown = [result for result in found if result["score"] >= args.min_score]
            drawn = draw(picture, shown, as_coco(picture, number, categories))
            target = args.output_dir / f"{number:05}_{path.stem}.jpg"
            Image.fromarray(drawn).save(target, quality=90)
            print(f"{printable(str(target), 1000)}: {len(shown)} objects", flush=True)
        with write_whole(args.output_dir / "coco_instances_results.json") as file:
            file.write(json.dumps(results) + "\n")
        print(f"{args.output_dir / 'coco_instances_results.json'}: {len(results)} of any score")
        if unread:
            raise InputError(f"{unread} of {len(pictures)} files could not be read, see above")
