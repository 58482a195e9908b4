#!/usr/bin/env python3
"""Generate the synthetic dataset `shapes` in COCO format, or clips of moving shapes.

The same arguments give the same files. Example:

    python tools/make_shapes.py datasets/shapes --num-train 600 --num-val 100
"""

import argparse
from pathlib import Path

try:
    from gn_det.data import make_shapes
    from gn_det.data.moving_shapes import make_moving_shapes
    from gn_det.errors import exit_on_input_error
except ImportError as error:
    if (error.name or "").partition(".")[0] != "detectron2":
        raise SystemExit(f"error: {error}") from None
    from gn_det.errors import NO_DETECTRON2

    raise SystemExit(f"error: {NO_DETECTRON2}") from None


def main() -> None:
    """Parse the command line and write the dataset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder to create, such as datasets/shapes")
    help_ = "training images, or clips (default 600)"
    add("--num-train", type=int, default=600, metavar="N", help=help_)
    help_ = "validation images, or clips (default 100)"
    add("--num-val", type=int, default=100, metavar="N", help=help_)
    add("--seed", type=int, default=0, help="the same seed gives the same files (default 0)")
    add("--clips", action="store_true", help="clips whose classes differ in motion alone")
    args = parser.parse_args()
    with exit_on_input_error():
        make = make_moving_shapes if args.clips else make_shapes
        make(args.folder, args.num_train, args.num_val, args.seed)


if __name__ == "__main__":
    main()
