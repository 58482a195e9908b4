"""Figures of the report: metric curves, and images with detections or ground truth."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image
from pycocotools.coco import COCO
from torchvision.ops import box_convert
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .markdown import one_line

MIN_SCORE = 0.5  # detections below are not drawn
# Line width and font size, relative to the image's longer side; the smallest font in pixels
LINE, FONT, SMALLEST_FONT = 1 / 300, 1 / 40, 9
# Okabe and Ito's palette, which is safe for colour-blind readers
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")

Lines = Sequence[Mapping[str, float]]


def learning_curves(models: Mapping[str, Sequence[Lines]]) -> dict[str, str]:
    """Training loss and validation AP by iteration: means over seeds, with their range.

    Args:
        models: {model name: lines of `metrics.json`, for each seed}.

    Returns:
        {title: inline SVG}; metrics without any value are left out.
    """
    panels = {"total_loss": "training loss", "bbox/AP": "box AP", "segm/AP": "mask AP"}
    return {
        title: svg
        for key, title in panels.items()
        if (svg := _curves(models, key, title)) is not None
    }


def _curves(models: Mapping[str, Sequence[Lines]], key: str, title: str) -> str | None:
    figure, axes = _panel(title)
    for (name, seeds), colour in zip(models.items(), COLOURS * 4, strict=False):
        values: dict[int, list[float]] = {}
        for lines in seeds:
            for line in lines:
                if key in line:
                    values.setdefault(int(line["iteration"]) + 1, []).append(line[key])
        points = sorted(values)
        means = [float(np.mean(values[point])) for point in points]
        marker = "" if key == "total_loss" else "o"
        axes.plot(points, means, label=name, color=colour, marker=marker, markersize=4)
        low, high = ([f(values[point]) for point in points] for f in (min, max))
        axes.fill_between(points, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("iterations")
    axes.set_ylim(bottom=0)
    if not any(len(line.get_xdata()) for line in axes.lines):  # type: ignore[arg-type]
        return None
    _legend(axes)
    return _svg(figure)


def batch_curve(models: Sequence[Mapping[str, Any]], kind: str) -> str:
    """AP by images per batch, one line per norm, as in the paper's Figure 1.

    Args:
        models: the entries of "models" in `results.json`.
        kind: "bbox" or "segm".

    Returns:
        an inline SVG.
    """
    figure, axes = _panel(f"{'box' if kind == 'bbox' else 'mask'} AP by images per batch")
    norms = dict.fromkeys(model["norm"] for model in models)
    for norm, colour in zip(norms, COLOURS * 4, strict=False):
        mine = sorted((m for m in models if m["norm"] == norm), key=lambda m: m["images_per_batch"])
        batches = [m["images_per_batch"] for m in mine]
        means = [m[kind]["AP"]["mean"] for m in mine]
        spread = [m[kind]["AP"]["sd"] for m in mine]
        axes.errorbar(batches, means, spread, label=norm, color=colour, marker="o", capsize=3)
    ticks = sorted({model["images_per_batch"] for model in models})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("images per batch")
    _legend(axes)
    return _svg(figure)


def _panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    for text in axes.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)  # a $ in a name must not start a formula


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<!DOCTYPE")[2].partition(">")[2]


def draw(
    image: np.ndarray, objects: list[dict[str, Any]], truth: COCO, longest: int | None = None
) -> np.ndarray:
    """Draw COCO annotations or results on an image, with one colour per object.

    Args:
        image: uint8 of shape (H, W, 3), RGB.
        objects: annotations or results on this image.
        truth: has the image size and the categories.
        longest: maximum length of the longer side in pixels; larger images are scaled down.

    Returns:
        uint8 of shape (H', W', 3), RGB; of the image's own size without `longest`.
    """
    original = Image.fromarray(image)
    scale = min((longest or math.inf) / max(original.size), 1.0)
    size = (max(round(original.width * scale), 1), max(round(original.height * scale), 1))
    canvas = torch.from_numpy(np.array(original.resize(size))).permute(2, 0, 1)
    if objects:
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(objects))]
        if all(o.get("segmentation") for o in objects):
            # Large masks first, one by one: where masks overlap, torchvision would draw black
            for i in sorted(range(len(objects)), key=lambda i: -_box_area(objects[i])):
                mask = Image.fromarray(truth.annToMask(objects[i])).resize(size)
                painted = torch.from_numpy(np.array(mask)).bool()
                canvas = draw_segmentation_masks(canvas, painted, 0.45, colours[i])
        boxes = scale * box_convert(torch.tensor([o["bbox"] for o in objects]), "xywh", "xyxy")
        labels = [_label(o, truth) for o in objects]
        labelled = any(labels)
        canvas = draw_bounding_boxes(
            canvas,
            boxes,
            labels if labelled else None,
            colours,
            width=max(round(LINE * max(size)), 1),
            font=findfont("DejaVu Sans"),  # included in matplotlib
            font_size=max(round(FONT * max(size)), SMALLEST_FONT),
            label_colors="white" if labelled else None,
            label_background_colors=colours if labelled else None,
            fill_labels=labelled,
        )
    return canvas.permute(1, 2, 0).numpy()


def _box_area(entry: Mapping[str, Any]) -> float:
    return entry["bbox"][2] * entry["bbox"][3]


def _label(entry: Mapping[str, Any], truth: COCO) -> str:
    """The class, which a single class does not need, and the score of a detection in percent."""
    name = one_line(truth.cats[entry["category_id"]]["name"]) if len(truth.cats) > 1 else ""
    return f"{name} {entry['score']:.0%}".strip() if "score" in entry else name


def data_uri(image: np.ndarray) -> str:
    """Encode a uint8 RGB image of shape (H, W, 3) as the data URI of a JPEG."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
