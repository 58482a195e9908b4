"""Bring a pretrained ResNet into Detectron2, and a BN one to Group Normalization if wanted.

INPUT is a file of torchvision, timm, Detectron, GroupNorm-reproduce, MMDetection, tensorpack or
Detectron2: .pth, .pkl, .npz or .safetensors. OUTPUT is for MODEL.WEIGHTS; beside it, OUTPUT with
the ending .yaml has the config keys that must agree with it.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..check.machine import check_device
from ..checkpoint.bn_to_gn import NUM_IMAGES, to_group_norm
from ..checkpoint.convert import convert, fold_input
from ..checkpoint.names import SOURCES
from ..checkpoint.read import read_weights
from ..checkpoint.save import facts_of, keys_as_yaml, save_backbone
from ..data.unlabelled_images import choose_images
from ..errors import InputError, exit_on_input_error
from ..modeling.norm import is_group_norm


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", metavar="INPUT", help="a file, or an address such as detectron2://...")
    add("output", type=Path, metavar="OUTPUT.pth")
    add("--source", choices=["auto", *SOURCES], default="auto", help="whose names the file has")
    help_ = "how the names of the network begin, where INPUT holds several"
    add("--prefix", metavar="PREFIX", help=help_)
    add("--norm", choices=["FrozenBN", "GN"], help="of the output; as in INPUT by default")
    add("--calibrate", type=Path, metavar="IMAGES", help="folder that gamma and beta are set on")
    help_ = f"how many to take ({NUM_IMAGES})"
    add("--num-images", "--num-pictures", type=int, default=NUM_IMAGES, metavar="N", help=help_)
    add("--distill", type=int, default=0, metavar="STEPS", help="then train towards INPUT's output")
    add("--fold-input", action="store_true", help="for BGR pictures with pixel std 1")
    help_ = "a tensor's name or pattern that may be "
    add("--allow-missing", action="append", default=[], metavar="NAME", help=f"{help_}absent")
    add("--allow-unknown", action="append", default=[], metavar="NAME", help=f"{help_}left out")
    help_ = "KEY VALUE pairs that INPUT's names cannot tell, as INPUT.FORMAT BGR"
    add("opts", nargs="*", help=help_)
    return parser.parse_intermixed_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other or name impossible places.

    Raises:
        InputError: naming the flag or file.
    """
    if "://" not in args.input and not Path(args.input).is_file():
        what = "is a folder" if Path(args.input).is_dir() else "does not exist"
        raise InputError(f"{args.input} {what}: INPUT is the file of a backbone")
    if args.output.suffix != ".pth":
        raise InputError(f"{args.output} has to end in .pth, by which Detectron2 knows the format")
    if args.output.exists() and Path(args.input).exists() and args.output.samefile(args.input):
        raise InputError(f"{args.output} is INPUT itself: give OUTPUT another name")
    if (snippet := args.output.with_suffix(".yaml")).exists() and not args.output.exists():
        raise InputError(f"{snippet} is no earlier conversion's: give OUTPUT another name")
    if not args.output.parent.is_dir():
        raise InputError(f"{args.output.parent} is no folder: make it, or name another OUTPUT")
    if not os.access(args.output.parent, os.W_OK) or args.output.is_dir():
        raise InputError(f"{args.output} cannot be written: name another OUTPUT")
    if args.num_images < 1 or args.distill < 0:
        raise InputError("--num-images has to be 1 or more, and --distill 0 or more")
    if args.distill and not args.calibrate:
        raise InputError("--distill needs the pictures of --calibrate")
    if len(args.opts) % 2:
        raise InputError(f"{args.opts[-1]} has no value: give KEY VALUE pairs")


def fetch(address: str) -> Path:
    """The file itself, downloaded where Detectron2 would download it to.

    Raises:
        InputError: if it cannot be had.
    """
    try:
        path = Path(PathManager.get_local_path(address))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{address} cannot be fetched: {error}") from None
    if not path.is_file():
        raise InputError(f"{address} cannot be fetched: it is no address that Detectron2 knows")
    return path


def check_norm(args: argparse.Namespace, norm: str) -> None:
    """Refuse a norm that a backbone of `norm` cannot be brought to.

    Raises:
        InputError: naming the flag.
    """
    of_group = is_group_norm(norm)
    if args.norm == "FrozenBN" and of_group:
        raise InputError(f"{args.input} has GN, which cannot become FrozenBN: leave --norm out")
    if args.norm == "GN" and not of_group and not args.calibrate:
        raise InputError(
            "--norm GN needs --calibrate PICTURES: BN's gamma and beta would give other features "
            "under GN's statistics"
        )
    if args.calibrate and args.norm != "GN" and not of_group:
        raise InputError("--calibrate sets GN's gamma and beta: add --norm GN")


def run(argv: Sequence[str] | None = None) -> None:
    """The whole of `tools/convert_backbone.py`."""
    args = parse(argv)
    setup_logger(name="gn_det")
    with exit_on_input_error():
        check_arguments(args)
        pairs = list(zip(args.opts[::2], args.opts[1::2], strict=True))
        # What is measured anew is the output's, and no fact of INPUT
        new = [p for p in pairs if args.calibrate and p[0].startswith("MODEL.GROUP_NORM.")]
        known = [word for pair in pairs if pair not in new for word in pair]
        file = read_weights(fetch(args.input))
        conversion = convert(file, args.source, known, args.prefix)
        print("\n".join(conversion.account()), flush=True)
        conversion.refuse_gaps(args.allow_missing, args.allow_unknown)
        check_norm(args, conversion.cfg.MODEL.RESNETS.NORM)
        check_device(conversion.cfg)
        if args.fold_input:
            fold_input(conversion)
        if args.calibrate:
            torch.manual_seed(0)
            pictures = choose_images(args.calibrate, args.num_images)
            to_group_norm(conversion, [word for p in new for word in p], pictures, args.distill)
        try:
            save_backbone(conversion.tensors, conversion.cfg, args.output)
        except OSError as error:
            raise InputError(f"{args.output} cannot be written: {error.strerror}") from None
        print(f"\n{args.output} is for this config:\n")
        print(keys_as_yaml(facts_of(conversion.cfg), args.output))
