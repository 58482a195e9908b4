#!/usr/bin/env python3
"""Run a model that export_model.py wrote, with ONNX Runtime, NumPy and Pillow alone."""

import argparse
import json
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def detect(
    session: onnxruntime.InferenceSession, image: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Detect the objects in an RGB image, uint8 of shape (H, W, 3).

    Returns:
        boxes (N, 4), XYXY in pixels; classes (N,); scores (N,); masks (N, H, W), bool. And the
        model's metadata, with the names of the classes in "categories".
    """
    about = json.loads(session.get_modelmeta().custom_metadata_map["gn_det"])
    height, width = image.shape[:2]
    scale = min(about["min_size"] / min(height, width), about["max_size"] / max(height, width))
    scale = scale or 1.0
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), "float32")
    pixels = pixels[..., ::-1] if about["input_format"] == "BGR" else pixels
    outputs = session.run(None, {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1))})
    found = dict(zip(about["outputs"], outputs, strict=True))
    found["boxes"] = found["boxes"] * np.tile([width / size[0], height / size[1]], 2)
    found["boxes"] = found["boxes"].clip(0, np.tile([width, height], 2)).astype("float32")
    kept = (found["boxes"][:, :2] < found["boxes"][:, 2:]).all(1)
    found = {name: values[kept] for name, values in found.items()}
    if "masks" in found:
        pairs = zip(found["masks"], found["boxes"], strict=True)
        pasted = [paste(mask[0], box, height, width) for mask, box in pairs]
        found["masks"] = np.array(pasted, bool).reshape(-1, height, width)
    return found, about


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Paste a mask of probabilities, (M, M), into its box by bilinear interpolation."""

    def weights(length: int, start: float, end: float, side: int) -> np.ndarray:
        positions = (np.arange(length) + 0.5 - start) / (end - start) * side - 0.5
        return np.maximum(1 - abs(positions[:, None] - np.arange(side)), 0)

    x0, y0, x1, y1 = box
    rows, columns = weights(height, y0, y1, len(mask)), weights(width, x0, x1, len(mask))
    return rows @ mask @ columns.T >= 0.5


def main() -> None:
    """Print the detections, and write each image with its masks painted red."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/run_onnx.py output/gn/model.onnx image.jpg",
    )
    parser.add_argument("model", help="model.onnx")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--min-score", type=float, default=0.5, help="lowest score that is shown")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    for path in args.images:
        image = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        found, about = detect(session, image)
        for i in np.flatnonzero(found["scores"] >= args.min_score):
            name = about["categories"][found["classes"][i]]["name"]
            print(f"{path}: {name} {found['scores'][i]:.2f} {found['boxes'][i].round(1).tolist()}")
            if "masks" in found:
                image[found["masks"][i]] = image[found["masks"][i]] // 2 + (128, 0, 0)
        Image.fromarray(image).save(f"{path}.found.png")


if __name__ == "__main__":
    main()
