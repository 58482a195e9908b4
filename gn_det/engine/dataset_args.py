"""`--train` and `--val`: a COCO-format data set of one's own, for the tools that train on one."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..check.anchors import objects_out_of_reach
from ..config import as_opts
from ..data.clean import Source, survey
from ..data.findings import refuse
from ..data.object_sizes import ObjectSizes
from ..data.prepare import Prepared, keys_of, prepare
from ..errors import InputError


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name training and validation data."""
    add = parser.add_argument
    pair: dict[str, Any] = {"nargs": 2, "metavar": ("JSON", "IMAGES"), "type": Path}
    add("--train", help="COCO-format annotations to train on, and their folder of pictures", **pair)
    add("--val", help="the same to measure on; a part of --train by default", **pair)
    help_ = "share of --train that is measured on, without --val (default 0.2)"
    add("--val-fraction", type=float, metavar="F", help=help_)
    help_ = "what must not be divided by that: a field of the JSON's images, or a regular "
    help_ += "expression that finds the group in file_name"
    add("--group-by", metavar="KEY", help=help_)


def prepare_data(
    args: argparse.Namespace, cfg: CfgNode, folder: Path, going_on: bool = False
) -> Prepared:
    """Look at the data that the flags name, say what was noticed, and write it to `folder`.

    Args:
        args: with the flags of `add_data_arguments`.
        cfg: tells whether masks are wanted.
        going_on: whether something has been trained on what `folder` holds.

    Raises:
        InputError: for data that would train wrongly, and flags that do not go together.
    """
    if args.val and (args.val_fraction is not None or args.group_by is not None):
        raise InputError("--val-fraction and --group-by divide --train: leave out them, or --val")
    options: dict[str, Any] = {"masks": cfg.MODEL.MASK_ON}
    if not args.val:
        options |= {
            "val_fraction": 0.2 if args.val_fraction is None else args.val_fraction,
            "group_by": args.group_by,
        }
    val = Source(*args.val) if args.val else None
    prepared = prepare(Source(*args.train), val, folder, going_on=going_on, **options)
    for name, findings in prepared.findings.items():
        for finding in findings:
            print(f"{name}: {finding}", flush=True)
    return prepared


def describe_data(cfg: CfgNode) -> Iterator[str]:
    """What there is to notice in a config's data sets, as far as they are on this machine.

    Raises:
        InputError: for what would train or measure wrongly.
    """
    splits = {"train": cfg.DATASETS.TRAIN, "val": cfg.DATASETS.TEST}
    for name in dict.fromkeys((*splits["train"], *splits["val"])):
        metadata = MetadataCatalog.get(name)
        path = Path(metadata.get("json_file") or "")
        used_for = [split for split, names in splits.items() if name in names]
        # What was prepared has been looked at
        if path.is_file() and str(path) != name:
            source = Source(path, Path(metadata.image_root))
            findings = survey(source, used_for[0] if len(used_for) == 1 else "")
            refuse({name: findings})
            yield from (f"{name}: {finding}" for finding in findings)
        if path.is_file() and "train" in used_for:
            yield from (
                f"{name}: {line}" for line in objects_out_of_reach(cfg, ObjectSizes.of(path))
            )


def data_opts(args: argparse.Namespace, cfg: CfgNode) -> list[str]:
    """`KEY VALUE` pairs that take the data of the flags; nothing without `--train`.

    Raises:
        InputError: as `prepare_data`, and for flags without `--train`.
    """
    if not args.train:
        if args.val or args.val_fraction is not None or args.group_by is not None:
            raise InputError("--val, --val-fraction and --group-by need --train JSON IMAGES")
        return []
    folder = Path(cfg.OUTPUT_DIR) / "data"
    going_on = args.resume or args.eval_only
    keys = keys_of(prepare_data(args, cfg, folder, going_on), cfg)
    return as_opts(keys)
