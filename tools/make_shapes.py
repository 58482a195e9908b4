#!/usr/bin/env python3
"""Generate the synthetic dataset `shapes` in COCO format.

The same arguments give the same files. Example:

    python tools/make_shapes.py datasets/shapes --num-train 600 --num-val 100
"""

import argparse
from pathlib import Path

try:
    from gn_det.data import make_shapes
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
    add("--num-train", type=int, default=600, metavar="N", help="training images (default 600)")
    add("--num-val", type=int, default=100, metavar="N", help="validation images (default 100)")
    add("--seed", type=int, default=0, help="the same seed gives the same files (default 0)")
    args = parser.parse_args()
    with exit_on_input_error():
        make_shapes(args.folder, args.num_train, args.num_val, args.seed)


if __name__ == "__main__":
    main()
