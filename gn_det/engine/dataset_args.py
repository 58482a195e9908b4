"""The flags `--train` and `--val`, which name a custom dataset in COCO format."""

import argparse
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..check.anchors import objects_out_of_reach
from ..config import as_opts, parse_opts
from ..config_file import read_config
from ..data.clean import Source
from ..data.findings import raise_if_fatal
from ..data.object_sizes import ObjectSizes
from ..data.prepare import Prepared, evaluation_keys, keys_of, prepare, prepare_test
from ..data.registered import datasets_of, inspect_registered
from ..errors import InputError
from ..model_zoo import CONFIG_ROOT
from .autoconfig import Proposal, fit_recipes

# Keys of a schedule from whose published values others are scaled
SCALED = ("SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.BASE_LR")


def add_data_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add `--train`, `--val`, `--val-fraction` and `--group-by` to a parser.

    Args:
        required: whether `--train` must be given.
    """
    add = parser.add_argument
    pair: dict[str, Any] = {"nargs": 2, "metavar": ("JSON", "IMAGES"), "type": Path}
    help_ = "training set: COCO-format annotations and the folder of the images "
    help_ += "(required)" if required else "(default: the DATASETS of the config)"
    add("--train", help=help_, required=required, **pair)
    help_ = "validation set, in the same form (default: a part of --train)"
    help_ += "" if required else "; alone with --eval-only, to evaluate a model on it"
    add("--val", help=help_, **pair)
    help_ = "fraction of --train that is used for validation, without --val (default: 0.2)"
    add("--val-fraction", type=float, metavar="F", help=help_)
    help_ = "keep images of the same group in the same set: a field of the JSON's images, or a "
    help_ += "regular expression that is searched in file_name (default: no groups)"
    add("--group-by", metavar="KEY", help=help_)


def prepare_data(
    args: argparse.Namespace, cfg: CfgNode, folder: Path, resume: bool = False
) -> Prepared:
    """Check the custom dataset, print the findings, and write cleaned copies to `folder`.

    Args:
        args: with the flags of `add_data_arguments`.
        cfg: `MODEL.MASK_ON` decides whether masks are needed.
        folder: the folder for the copies.
        resume: whether a run has already used the data in `folder`.

    Returns:
        the paths of the copies, and the findings.

    Raises:
        InputError: for errors that would corrupt training or evaluation, and for flags that
            exclude each other.
    """
    if args.val and (args.val_fraction is not None or args.group_by is not None):
        raise InputError("--val-fraction and --group-by split --train: remove them or --val")
    options: dict[str, Any] = {"masks": cfg.MODEL.MASK_ON}
    if not args.val:
        options |= {
            "val_fraction": 0.2 if args.val_fraction is None else args.val_fraction,
            "group_by": args.group_by,
        }
    val = Source(*args.val) if args.val else None
    prepared = prepare(Source(*args.train), val, folder, resume=resume, **options)
    for name, findings in prepared.findings.items():
        for finding in findings:
            print(f"{name}: {finding}", flush=True)
    return prepared


def describe_data(cfg: CfgNode) -> Iterator[str]:
    """Describe the findings in a config's datasets; datasets that are not found are skipped.

    Yields:
        one line per finding.

    Raises:
        InputError: for errors that would corrupt training or evaluation.
    """
    for name, split in datasets_of(cfg).items():
        path = Path(MetadataCatalog.get(name).get("json_file") or "")
        if path.is_file():
            findings = inspect_registered(name, cfg, split)
            raise_if_fatal({name: findings})
            yield from (f"{name}: {finding}" for finding in findings)
        if path.is_file() and split != "val":
            yield from (
                f"{name}: {line}" for line in objects_out_of_reach(cfg, ObjectSizes.of(path))
            )


def data_opts(args: argparse.Namespace, cfg: CfgNode, num_gpus: int) -> list[str]:
    """Prepare the custom dataset, and return the `KEY VALUE` overrides that select it.

    With `--eval-only`, `--val` alone is enough. A config that ships with gn_det is also fitted to
    the dataset, as by `compare`.

    Args:
        args: with the flags of `add_data_arguments`, `--config-file`, `--resume`, `--eval-only` and
            the user's `KEY VALUE` pairs.
        cfg: `OUTPUT_DIR` is where copies are written.
        num_gpus: total number of GPUs on all machines.

    Returns:
        alternating keys and values; none without a custom dataset.

    Raises:
        InputError: as `prepare_data`, and for `--val` and the like without `--train` or
            `--eval-only`.
    """
    folder = Path(cfg.OUTPUT_DIR) / "data"
    options = (args.val_fraction, args.group_by)
    if args.val and args.eval_only and not args.train and options == (None, None):
        path, findings = prepare_test(Source(*args.val), folder, cfg.MODEL.MASK_ON)
        for finding in findings:
            print(f"val: {finding}", flush=True)
        return as_opts(evaluation_keys(path, cfg))
    if not args.train:
        if args.val or args.val_fraction is not None or args.group_by is not None:
            raise InputError("--val, --val-fraction and --group-by need --train JSON IMAGES")
        return []
    prepared = prepare_data(args, cfg, folder, resume=args.resume or args.eval_only)
    keys = keys_of(prepared, cfg)
    if not args.eval_only and CONFIG_ROOT in Path(args.config_file).absolute().parents:
        given = parse_opts(args.opts)
        # The recipe's own length and batch are what its rate and steps are scaled from
        pairs = {key: value for key, value in given.items() if key not in SCALED} | keys
        recipe = read_config(args.config_file, as_opts(pairs), args.allow_remote_base)
        proposals = fit_to_dataset(recipe, ObjectSizes.of(Path(prepared.train)), given, num_gpus)
        print("\n".join(["", "adapted to the dataset", *(f"  {p}" for p in proposals)]), flush=True)
        keys |= {proposal.key: proposal.value for proposal in proposals}
    return as_opts(keys)


def fit_to_dataset(
    cfg: CfgNode, sizes: ObjectSizes, given: Mapping[str, str], num_gpus: int
) -> list[Proposal]:
    """The changes of a published recipe for a dataset: input size, anchors, schedule and rate.

    Args:
        cfg: the recipe, merged with the user's pairs except those of `SCALED`.
        sizes: image and object sizes of the training set.
        given: the user's `KEY VALUE` pairs, which are not changed. The batch is
            `SOLVER.IMS_PER_BATCH`, if it is among them, else the recipe's for so many GPUs; the
            length is `SOLVER.MAX_ITER`, or depends on the number of images.
        num_gpus: total number of GPUs.
    """
    batch, gpus = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    batch = max(batch * num_gpus // gpus, 1) if gpus else batch
    batch = int(given.get("SOLVER.IMS_PER_BATCH", batch))
    pairs = [*chain(*given.items())]
    return fit_recipes(cfg, sizes, [batch], given.get("SOLVER.MAX_ITER"), pairs)[batch]
