"""The comparison of finished runs: `results.json`, `report.md` and `report.html`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..files import write_whole
from .coco_stats import STATS, coco_stats, load_coco
from .figures import MIN_SCORE, curves_svg, data_uri, draw

NUM_PICTURES = 6


@dataclass(frozen=True)
class Run:
    """A finished training.

    Args:
        name: of the model, as the report calls it.
        where: which parts have which norm, in a few words.
        config_file: the config that was trained.
        folder: its `OUTPUT_DIR`, with `run.json`, `metrics.json` and `inference/`.
    """

    name: str
    where: str
    config_file: str
    folder: Path

    @property
    def detections(self) -> Path:
        return self.folder / "inference" / "coco_instances_results.json"

    def metrics(self) -> list[dict[str, float]]:
        """The lines of `metrics.json`; after a resume the newest of each iteration counts."""
        lines = map(json.loads, (self.folder / "metrics.json").read_text().splitlines())
        newest = {line["iteration"]: line for line in lines}
        return [newest[iteration] for iteration in sorted(newest)]


def summarize(run: Run, annotations: Path) -> dict[str, Any]:
    """One model's entry of `results.json`: COCO's numbers in percent, costs, and what was run."""
    metrics = run.metrics()
    seconds = [line["time"] for line in metrics if "time" in line]
    memory = [line["peak_memory_mib"] for line in metrics if "peak_memory_mib" in line]
    return {
        "model": run.name,
        "where": run.where,
        "config_file": run.config_file,
        **coco_stats(annotations, run.detections),
        "seconds_per_iteration": median(seconds) if seconds else None,  # none below 4 iterations
        "peak_memory_mib": max(memory),
        **json.loads((run.folder / "run.json").read_text()),
    }


def write_report(
    runs: Sequence[Run], annotations: Path, images: Path, output: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Write `results.json`, `report.md` and the self-contained `report.html` into `output`.

    Args:
        runs: the models that are compared, the baseline first.
        annotations: ground truth of the validation pictures, in COCO's format.
        images: folder of the validation pictures.
        about: goes into `results.json` and the report's heading as it is: `title`, `text`, and a
            table `facts` of names and values.

    Returns:
        what `results.json` holds.
    """
    models = [summarize(run, annotations) for run in runs]
    results = {**about, "models": models}
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        undefined=StrictUndefined,
        autoescape=lambda name: name is not None and name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda x, digits=1: "–" if x is None else f"{x:.{digits}f}"
    content = {
        **about,
        "models": models,
        "answer": _answer(models),
        "stats": STATS,
        "best": {kind: max(model[kind]["AP"] for model in models) for kind in ("bbox", "segm")},
        "curves": curves_svg({run.name: run.metrics() for run in runs}),
        "pictures": _pictures(runs, annotations, images),
        "min_score": MIN_SCORE,
    }
    with write_whole(output / "results.json") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    for name in ("report.md", "report.html"):
        with write_whole(output / name) as file:
            file.write(environment.get_template(name).render(content))
    return results


def _answer(models: list[dict[str, Any]]) -> str:
    """The comparison in one sentence, the first model being the baseline."""
    baseline, *others = models
    told = []
    for model in others:
        gain = model["bbox"]["AP"] - baseline["bbox"]["AP"]
        side = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
        told.append(f"{model['model']} reaches {model['bbox']['AP']:.1f}, {side} it")
    return f"{baseline['model']} reaches box AP {baseline['bbox']['AP']:.1f}; {'; '.join(told)}."


def _pictures(runs: Sequence[Run], annotations: Path, images: Path) -> list[dict[str, Any]]:
    """Rows of pictures: the ground truth, then each model's detections, as data URIs."""
    truth = load_coco(annotations)
    found = {run.name: json.loads(run.detections.read_text()) for run in runs}
    busy = [i for i in truth.getImgIds() if len(truth.getAnnIds(i, iscrowd=False)) >= 3]
    rows = []
    for image_id in busy[:NUM_PICTURES]:
        picture = images / truth.imgs[image_id]["file_name"]
        objects = {"ground truth": truth.imgToAnns[image_id]}
        for name, detections in found.items():
            objects[name] = [
                d for d in detections if d["image_id"] == image_id and d["score"] >= MIN_SCORE
            ]
        cells = {name: data_uri(draw(picture, shown, truth)) for name, shown in objects.items()}
        rows.append({"name": picture.name, "cells": cells})
    return rows
