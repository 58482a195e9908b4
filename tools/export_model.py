#!/usr/bin/env python3
"""Export a trained model to other runtimes: see --help."""

try:
    from gn_det.cli import run_command
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    run_command("export")
