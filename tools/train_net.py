#!/usr/bin/env python3
"""Train or evaluate a detector, with Detectron2's flags: see --help."""

try:
    from gn_det.cli import run_command
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    run_command("train")
