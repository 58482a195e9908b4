#!/usr/bin/env python3
"""Bring a pretrained backbone into Detectron2, as BN* or as GN: see --help."""

try:
    from gn_det.engine import convert_backbone
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    convert_backbone.run()
