#!/usr/bin/env python3
"""Write the embedded data set `shapes`, in COCO format, for any size and seed."""

import argparse
from pathlib import Path

try:
    from gn_det.data import make_shapes
    from gn_det.errors import exit_on_input_error
except ImportError as error:
    raise SystemExit(f"error: {error}") from None


def main() -> None:
    """Parse the command line and write the data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to make, as datasets/shapes")
    parser.add_argument("--num-train", type=int, default=600, metavar="N")
    parser.add_argument("--num-val", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with exit_on_input_error():
        make_shapes(args.folder, args.num_train, args.num_val, args.seed)


if __name__ == "__main__":
    main()
