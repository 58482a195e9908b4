"""The report's pictures: curves of a run's metrics, and detections beside the ground truth."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image
from pycocotools.coco import COCO
from torchvision.ops import box_convert
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

MIN_SCORE = 0.5  # detections below are not drawn
SCALE = 2  # picture pixels to report pixels
# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")


def curves_svg(runs: dict[str, list[dict[str, float]]]) -> str:
    """Training loss and validation box and mask AP over iterations, as one inline SVG.

    Args:
        runs: for each model's name the lines of its `metrics.json`.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = (("total_loss", "training loss"), ("bbox/AP", "box AP"), ("segm/AP", "mask AP"))
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for (name, lines), colour in zip(runs.items(), COLOURS, strict=False):
            points = [(line["iteration"] + 1, line[key]) for line in lines if key in line]
            marker = "" if key == "total_loss" else "o"
            axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker)
        axes.set_title(title)
        axes.set_xlabel("iterations")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<!DOCTYPE")[2].partition(">")[2]


def draw(picture: Path, objects: list[dict[str, Any]], truth: COCO) -> np.ndarray:
    """An RGB uint8 picture with COCO annotations or results drawn on it, one colour a category."""
    small = Image.open(picture).convert("RGB")
    size = (SCALE * small.width, SCALE * small.height)
    image = torch.from_numpy(np.array(small.resize(size))).permute(2, 0, 1)
    if objects:
        categories = truth.getCatIds()
        colours = [COLOURS[categories.index(o["category_id"]) % len(COLOURS)] for o in objects]
        masks = np.stack([truth.annToMask(found) for found in objects])
        large = masks.repeat(SCALE, axis=1).repeat(SCALE, axis=2).astype(bool)
        image = draw_segmentation_masks(image, torch.from_numpy(large), 0.45, colours)
        boxes = SCALE * box_convert(torch.tensor([o["bbox"] for o in objects]), "xywh", "xyxy")
        labels = []
        for found in objects:
            score = f" {found['score']:.0%}" if "score" in found else ""
            labels.append(truth.cats[found["category_id"]]["name"] + score)
        font = findfont("DejaVu Sans")  # comes with matplotlib
        image = draw_bounding_boxes(
            image,
            boxes,
            labels,
            colours,
            width=3,
            font=font,
            font_size=20,
            label_colors="white",
            label_background_colors=colours,
            fill_labels=True,
        )
    return image.permute(1, 2, 0).numpy()


def data_uri(image: np.ndarray) -> str:
    """An RGB uint8 picture as a JPEG that a page can hold in itself."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
