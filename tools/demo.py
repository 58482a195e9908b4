#!/usr/bin/env python3
"""BN* against GN in miniature, from an embedded data set to a report: see --help."""

try:
    from gn_det.comparison import demo
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    demo.run()
