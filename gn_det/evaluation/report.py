"""Compare finished training runs in `results.json`, `report.md` and `report.html`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from pycocotools.coco import COCO

from ..data.image_files import read_image
from ..files import write_whole
from .answer import WORDS, answer, differences
from .bootstrap import ImageMatches
from .coco_stats import STATS, coco_stats, kinds_of, load_coco
from .figures import MIN_SCORE, batch_curve, data_uri, draw, learning_curves
from .markdown import code, literal
from .metrics_file import metrics_of

NUM_IMAGES = 6
# Of these first images the ones on which the models differ most are shown
NUM_SEARCHED = 200
# Longer side of larger images in the report, in pixels
LONGEST = 1024


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Args:
        norm: its name in the report.
        images_per_batch: total batch size of the training.
        seed: runs of different norms are paired by it.
        folder: its `OUTPUT_DIR`, with `run.json`, `metrics.json` and `inference/`.
        where: which parts have which norm, as "GN: backbone, FPN".
    """

    norm: str
    images_per_batch: int
    seed: int
    folder: Path
    where: str = ""

    @property
    def detections(self) -> Path:
        """The results file of the final evaluation."""
        return self.folder / "inference" / "coco_instances_results.json"

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of `metrics.json`; after a resume the last one of each iteration is kept."""
        return metrics_of(self.folder)


def summarize(run: Run, truth: COCO) -> dict[str, Any]:
    """One run's entry in `results.json`: COCO metrics in percent, time, memory and versions."""
    seconds = [line["time"] for line in run.metrics if "time" in line]
    memory = [line["peak_memory_mib"] for line in run.metrics if "peak_memory_mib" in line]
    return {
        "norm": run.norm,
        "where": run.where,
        "images_per_batch": run.images_per_batch,
        "folder": str(run.folder),
        **coco_stats(truth, run.detections),
        "seconds_per_iteration": median(seconds) if seconds else None,  # none below 4 iterations
        "peak_memory_mib": max(memory, default=None),
        **json.loads((run.folder / "run.json").read_text()),
        "seed": run.seed,
    }


def write_report(
    runs: Sequence[Run], annotations: Path, output: Path, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `results.json`, `report.md` and the self-contained `report.html` into `output`.

    Args:
        runs: the runs to compare; the norm of the first is the baseline at each batch size.
        annotations: ground truth of the validation images in COCO's format. Each `file_name` is an
            absolute path, or relative to the folder `images/` next to this file.
        output: folder of the three files.
        about: `title`, `text` and `facts`, {subject: text, number or list of lines}, for all files;
            optionally `pairs`, the (norm, baseline) to compare, and `failed` and `rates`, as in
            `answer`. Without `pairs`, every norm is compared with the first. `tables` are shown
            after the first table: a list of {"title", "text", "header", "rows"}.

    Returns:
        the content of `results.json`.
    """
    truth = load_coco(annotations)
    kinds = kinds_of(truth)
    entries = [summarize(run, truth) for run in runs]
    models = _models(entries, kinds)
    matches = {kind: _match(runs, truth, kind) for kind in kinds}
    norms = list(dict.fromkeys(run.norm for run in runs))
    pairs = about.get("pairs") or [(norm, norms[0]) for norm in norms[1:]]
    found = {
        kind: {(r.norm, r.images_per_batch, r.seed): m for r, m in mine.items()}
        for kind, mine in matches.items()
    }
    gaps = differences(found, pairs)
    kind = kinds[-1]
    best = max(entries, key=lambda entry: entry[kind]["AP"])
    validation = {
        "pictures": len(truth.imgs),
        "objects": sum(not a["iscrowd"] for a in truth.anns.values()),
    }
    results = {
        **about,
        "answer": answer(gaps, models, about.get("failed", {}), about.get("rates", "")),
        "validation": validation,
        "differences": gaps,
        "models": models,
        "best": {key: best[key] for key in ("norm", "images_per_batch", "seed", "folder")},
        "runs": entries,
    }
    images = _compared_images(runs, matches[kind], truth, annotations.parent / "images")
    curves = {m["model"]: [r.metrics for r in runs if _same(r, m)] for m in models}
    batches = {model["images_per_batch"] for model in models}
    figures = {
        "curves": learning_curves(curves),
        "batches": [batch_curve(models, k) for k in kinds] if len(batches) > 1 else [],
        "images": images,
    }
    used = (", ".join(f"{k} {v}" for k, v in entry["versions"].items()) for entry in entries)
    figures["versions"] = list(dict.fromkeys(used))
    content = {"tables": [], **results, **figures, "stats": STATS, "kinds": kinds, "words": WORDS}
    content["overview"] = _overview(models, gaps, kinds)
    with write_whole(output / "results.json") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    for name in ("report.md", "report.html"):
        with write_whole(output / name) as file:
            file.write(_template(name).render(content, min_score=MIN_SCORE))
    return results


def _template(name: str) -> Template:
    """Load an HTML or Markdown template that escapes all values."""
    html = name.endswith(".html")
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        undefined=StrictUndefined,
        autoescape=html,
        finalize=None if html else literal,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda x, digits=1: "–" if x is None else f"{x:.{digits}f}"
    environment.filters["signed"] = lambda x: f"{x:+.1f}".replace("-", "−")
    environment.filters["code"] = code
    return environment.get_template(name)


def _same(run: Run, model: Mapping[str, Any]) -> bool:
    """Whether a run belongs to an entry of "models"."""
    return (run.norm, run.images_per_batch) == (model["norm"], model["images_per_batch"])


def _models(entries: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per norm and batch size, with means and standard deviations over seeds."""
    several = len({entry["images_per_batch"] for entry in entries}) > 1
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["norm"], entry["images_per_batch"]), []).append(entry)
    models = []
    for (norm, images), mine in groups.items():
        seconds = [e["seconds_per_iteration"] for e in mine if e["seconds_per_iteration"]]
        model = {
            "model": f"{norm}, batch size {images}" if several else norm,
            "norm": norm,
            "where": mine[0]["where"],
            "images_per_batch": images,
            "seeds": [entry["seed"] for entry in mine],
            "seconds_per_iteration": median(seconds) if seconds else None,
            "peak_memory_mib": max(
                (e["peak_memory_mib"] for e in mine if e["peak_memory_mib"]), default=None
            ),
            "parameters": mine[0]["parameters"],
        }
        for kind in kinds:
            model[kind] = {stat: _spread([e[kind][stat] for e in mine]) for stat in STATS}
            names = mine[0][kind]["classes"]
            model[kind]["classes"] = {
                name: _spread([e[kind]["classes"][name] for e in mine]) for name in names
            }
        models.append(model)
    return models


def _overview(
    models: Sequence[Mapping[str, Any]],
    gaps: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
) -> list[dict[str, Any]]:
    """Rows of the first table: AP of each model, and its difference from the baseline.

    Returns:
        one {"model", "cells"} for each model; a cell of each kind has "mean" and "sd" of AP, and
        "gap", an entry of `differences`, or None for the baseline.
    """
    baseline = gaps[0]["baseline"] if gaps else None
    own = {
        (gap["norm"], gap["images_per_batch"], gap["of"]): gap
        for gap in gaps
        if gap["baseline"] == baseline
    }
    return [
        {
            "model": model["model"],
            "seeds": len(model["seeds"]),
            "cells": [
                model[kind]["AP"]
                | {"gap": own.get((model["norm"], model["images_per_batch"], WORDS[kind]))}
                for kind in kinds
            ],
        }
        for model in models
    ]


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds; both None without ground truth."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "sd": None}
    return {"mean": mean(known), "sd": stdev(known) if len(known) > 1 else 0.0}


def _match(runs: Sequence[Run], truth: COCO, kind: str) -> dict[Run, ImageMatches]:
    return {run: ImageMatches.from_results(truth, run.detections, kind) for run in runs}


def _compared_images(
    runs: Sequence[Run], matches: Mapping[Run, ImageMatches], truth: COCO, folder: Path
) -> list[dict[str, Any]]:
    """The images on which the norms differ most, at the first batch size and seed.

    Returns:
        one {"name": file name, "cells": {"ground truth" or norm: data URI}} for each image.
    """
    compared = [run for run in runs if run.images_per_batch == runs[0].images_per_batch]
    ids = matches[runs[0]].image_ids[:NUM_SEARCHED]
    alone = np.eye(len(ids), len(matches[runs[0]].image_ids))
    shown = {}
    scores = []
    for norm in dict.fromkeys(run.norm for run in compared):
        same = [run for run in compared if run.norm == norm]
        scores.append(np.mean([matches[run].resampled_ap(alone) for run in same], axis=0))
        shown[norm] = json.loads(same[0].detections.read_text())
    gaps = np.nan_to_num(np.ptp(np.array(scores), axis=0), nan=-1.0)
    rows = []
    for i in np.argsort(-gaps, kind="stable")[:NUM_IMAGES]:
        number = int(ids[i])
        entry = truth.imgs[number]
        objects = {"ground truth": truth.imgToAnns[number]}
        for norm, detections in shown.items():
            mine = (d for d in detections if d["image_id"] == number)
            objects[norm] = [d for d in mine if d["score"] >= MIN_SCORE]
        cells = {
            name: data_uri(draw(read_image(folder / entry["file_name"]), drawn, truth, LONGEST))
            for name, drawn in objects.items()
        }
        rows.append({"name": Path(entry.get("listed_as", entry["file_name"])).name, "cells": cells})
    return rows
