#!/usr/bin/env python3
"""What a trained model finds in pictures: see --help."""

try:
    from gn_det.engine import predict
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

if __name__ == "__main__":
    predict.run()
