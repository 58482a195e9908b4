"""Convert a pretrained ResNet or VGG to Detectron2's format, and optionally from BN to GN.

Example:
  python tools/convert_backbone.py resnet50.pth R-50-GN.pth --norm GN --calibrate datasets/images

INPUT can come from torchvision, timm, Detectron, GroupNorm-reproduce, MMDetection, tensorpack or
Detectron2. Set MODEL.WEIGHTS to OUTPUT.pth. The file OUTPUT.yaml contains the config keys that
must agree with these weights.
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
from ..config import as_opts, parse_opts
from ..data.unlabelled_images import choose_images
from ..errors import InputError, exit_on_input_error
from ..modeling.norm import backbone_norm, is_group_norm


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `argv` None means `sys.argv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    help_ = ".pth, .pkl, .npz or .safetensors file, or an address such as detectron2://..."
    add("input", metavar="INPUT", help=help_)
    add("output", type=Path, metavar="OUTPUT.pth", help="the file to write")
    help_ = "naming scheme of INPUT (default: auto, detected from the tensor names)"
    add("--source", choices=["auto", *SOURCES], default="auto", help=help_)
    help_ = "prefix of the tensor names to use, if INPUT holds several networks (default: detected)"
    add("--prefix", metavar="PREFIX", help=help_)
    help_ = "norm of the output (default: the norm of INPUT)"
    add("--norm", choices=["FrozenBN", "GN"], help=help_)
    help_ = "folder of unlabelled images to set GN's gamma and beta with (default: none)"
    add("--calibrate", type=Path, metavar="IMAGES", help=help_)
    help_ = f"number of images to use from the --calibrate folder (default: {NUM_IMAGES})"
    add("--num-images", "--num-pictures", type=int, default=NUM_IMAGES, metavar="N", help=help_)
    help_ = "training steps to reproduce INPUT's features after calibration (default: 0)"
    add("--distill", type=int, default=0, metavar="STEPS", help=help_)
    help_ = "rewrite the first convolution for BGR images with pixel std 1 (default: off)"
    add("--fold-input", action="store_true", help=help_)
    help_ = "name or pattern of tensors that INPUT may lack; can be repeated (default: none)"
    add("--allow-missing", action="append", default=[], metavar="NAME", help=help_)
    help_ = "name or pattern of INPUT's tensors to ignore; can be repeated (default: none)"
    add("--allow-unknown", action="append", default=[], metavar="NAME", help=help_)
    help_ = (
        "KEY VALUE pairs of config keys that INPUT does not determine, as INPUT.FORMAT BGR; with "
        "--calibrate, MODEL.GROUP_NORM keys set the grouping of the output (default for BN: "
        "DIM_PER_GP 16)"
    )
    add("opts", nargs="*", help=help_)
    return parser.parse_intermixed_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Check that the arguments are consistent and the output can be written.

    Raises:
        InputError: naming the flag or file.
    """
    if "://" not in args.input and not Path(args.input).is_file():
        state = "is a folder" if Path(args.input).is_dir() else "does not exist"
        raise InputError(f"{args.input} {state}: INPUT must be a file of weights")
    if args.output.suffix != ".pth":
        raise InputError(f"{args.output}: OUTPUT must end in .pth, the format that is written")
    if args.output.exists() and Path(args.input).exists() and args.output.samefile(args.input):
        raise InputError(f"{args.output} is also INPUT: give OUTPUT another name")
    if (snippet := args.output.with_suffix(".yaml")).exists() and not args.output.exists():
        raise InputError(f"{snippet} exists and would be overwritten: give OUTPUT another name")
    if not args.output.parent.is_dir():
        raise InputError(f"{args.output.parent} is not a folder: create it or change OUTPUT")
    if not os.access(args.output.parent, os.W_OK) or args.output.is_dir():
        raise InputError(f"{args.output} cannot be written: change OUTPUT")
    if args.num_images < 1:
        raise InputError("--num-images must be 1 or larger")
    if args.distill < 0:
        raise InputError("--distill must be 0 or larger")
    if args.distill and not args.calibrate:
        raise InputError("--distill needs images: add --calibrate IMAGES")
    parse_opts(args.opts)


def fetch(address: str) -> Path:
    """Return the local path of a file, downloading it into Detectron2's cache if needed.

    Args:
        address: a path, a URL or an address of Detectron2 such as detectron2://...

    Raises:
        InputError: if the download fails.
    """
    try:
        path = Path(PathManager.get_local_path(address))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{address} cannot be downloaded: {error}") from None
    if not path.is_file():
        raise InputError(f"{address} cannot be downloaded: Detectron2 does not know such addresses")
    return path


def check_norm(args: argparse.Namespace, norm: str) -> None:
    """Check that --norm and --calibrate are possible for a backbone with this norm.

    Args:
        norm: the norm of INPUT.

    Raises:
        InputError: naming the flag.
    """
    has_gn = is_group_norm(norm)
    if args.norm == "FrozenBN" and has_gn:
        raise InputError(f"{args.input} has GN, which cannot become FrozenBN: omit --norm")
    if args.norm == "GN" and not has_gn and not args.calibrate:
        raise InputError(
            "--norm GN needs --calibrate IMAGES: BN's gamma and beta give other features with "
            "GN's statistics"
        )
    if args.calibrate and args.norm != "GN" and not has_gn:
        raise InputError("--calibrate sets GN's gamma and beta: add --norm GN")


def run(argv: Sequence[str] | None = None) -> None:
    """Run `tools/convert_backbone.py`.

    Args:
        argv: the command line arguments; None means `sys.argv`.

    Raises:
        SystemExit: with a one-sentence message if the input is invalid.
    """
    args = parse(argv)
    setup_logger(name="gn_det")
    with exit_on_input_error():
        check_arguments(args)
        given = parse_opts(args.opts)
        # With --calibrate, the grouping in `opts` describes the output, not INPUT
        new = {k for k in given if args.calibrate and k.startswith("MODEL.GROUP_NORM.")}
        known = as_opts({key: value for key, value in given.items() if key not in new})
        file = read_weights(fetch(args.input))
        conversion = convert(file, args.source, known, args.prefix)
        print("\n".join(conversion.summary()), flush=True)
        conversion.check_complete(args.allow_missing, args.allow_unknown)
        check_norm(args, backbone_norm(conversion.cfg))
        check_device(conversion.cfg)
        if args.fold_input:
            fold_input(conversion)
        if args.calibrate:
            torch.manual_seed(0)
            images = choose_images(args.calibrate, args.num_images)
            grouping = as_opts({key: given[key] for key in new})
            state = args.output.with_suffix(".partial")
            to_group_norm(conversion, grouping, images, args.distill, state)
        try:
            save_backbone(conversion.tensors, conversion.cfg, args.output, conversion.recipe)
        except OSError as error:
            raise InputError(f"{args.output} cannot be written: {error.strerror}") from None
        print(f"\n{args.output} needs these config keys:\n")
        print(keys_as_yaml(facts_of(conversion.cfg) | conversion.recipe, args.output))
