"""The model of a finished run: its config, weights and categories."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from ..check.layers import BUILD_ERRORS
from ..check.machine import check_machine
from ..checkpoint.checkpointer import StrictCheckpointer
from ..config import classes_key, default_device, value_of
from ..config_file import read_config
from ..errors import InputError
from ..evaluation.markdown import one_line
from ..modeling import build_on_meta_device
from ..plain_yaml import CONFIG_ERRORS, describe_error
from .run_record import RECORD

MAX_RECORD = 10 * 2**20  # bytes of run.json


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


def load_predictor(folder: str | Path, *opts: str) -> Predictor:
    """Load the model of a finished run, such as `output/compare/best`.

    Args:
        folder: `OUTPUT_DIR` of the run.
        opts: `KEY VALUE` overrides of its config, such as "MODEL.DEVICE", "cpu".

    Returns:
        a predictor, which is called with a BGR image, (H, W, 3) and uint8, as Detectron2's
        `DefaultPredictor`; its `metadata` has the names of the classes, for Detectron2's
        `Visualizer`.

    Raises:
        InputError: as `load_run`, and if the machine cannot run the model.
    """
    cfg, categories = load_run(Path(folder), Path(folder), opts)
    check_machine(cfg)
    predictor = Predictor(cfg)
    names = [category["name"] for category in categories]
    predictor.metadata = Metadata(name=str(folder), thing_classes=names)
    return predictor


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
    for key, value in (
        ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
        # It finds no objects
        ("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
    ):
        if value_of(cfg, key) == value:
            raise InputError(f"{config}: {key} {value} is not supported")
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
        key = classes_key(cfg)
        count: Any = value_of(cfg, key) if key else None
        categories = content.get("categories")
        if categories is None or categories == []:
            return [{"id": i, "name": f"class {i}"} for i in range(count or 0)]
        if not isinstance(categories, list) or not all(map(is_category, categories)):
            raise ValueError(
                "its categories are not a list of objects with id (0 or larger) and name"
            )
        if len({category["id"] for category in categories}) < len(categories):
            raise ValueError("two of its categories have the same id")
        if count is not None and len(categories) != count:
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
