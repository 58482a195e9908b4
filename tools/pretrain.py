#!/usr/bin/env python3
"""Pretrain a backbone on a data set's object crops: see --help."""

try:
    from gn_det.engine import pretrain
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    pretrain.run()
