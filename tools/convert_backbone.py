#!/usr/bin/env python3
"""Convert a pretrained backbone for Detectron2, BN to GN too: see --help."""

try:
    from gn_det.cli import run_command
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    run_command("convert")
