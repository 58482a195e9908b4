#!/usr/bin/env python3
"""Would GN help on your pictures? From a COCO folder to a BN*-against-GN report: see --help."""

try:
    from gn_det.comparison import compare
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    compare.run()
