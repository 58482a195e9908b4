#!/usr/bin/env python3
"""Pretrain a backbone on folders of pictures, with Detectron2's flags: see --help."""

try:
    from gn_det.engine import pretrain
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    pretrain.run()
