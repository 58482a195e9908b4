#!/usr/bin/env python3
"""Replicate the paper's Tables 1 to 3 on a small scale: ResNet-18 on crops of `shapes`.

Table 1 compares BN, LN, IN, weight normalization (WN) and GN at batch size 32. Table 2 compares BN
and GN at batch sizes 32 to 2, with the learning rate scaled linearly, and Batch Renormalization
(BRN) at 4 and 2. Table 3 varies GN's number of groups and channels per group, at batch size 8 and
on fewer crops. All models of a table are trained on the same number of crops. The same command
resumes an interrupted study.

With --clips, Table 8 instead: an I3D, inflated from ResNet-18, on clips of moving shapes. A step
always has 16 clips, which the network sees in 1, 4 or 8 passes. So BN's batch changes, and number
of steps, data and learning rate do not.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

try:
    import torch
    from detectron2.utils.env import seed_all_rng
    from matplotlib.figure import Figure
    from studies.pool import run_parallel
    from studies.tables import markdown_table

    from gn_det.config import as_opts
    from gn_det.config_file import read_config
    from gn_det.data import make_shapes
    from gn_det.data.moving_shapes import make_moving_shapes
    from gn_det.engine.pretrain import PretrainTrainer
    from gn_det.engine.run_record import git_commit, versions
    from gn_det.errors import InputError, exit_on_input_error
    from gn_det.evaluation.figures import COLOURS
    from gn_det.evaluation.metrics_file import metrics_of
    from gn_det.files import write_whole
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

CONFIG, CLIPS_CONFIG = "Shapes/study_R_18.yaml", "Shapes/clips_R_18_gn.yaml"
EXAMPLE = "example: python tools/study_norms.py --output-dir output/study --seeds 2"
IMAGES = (600, 300)  # for training and validation; crops are cut from them
CLIPS = (480, 240)


class Model(NamedTuple):
    """Settings of one cell of a table.

    Args:
        norm: of the backbone.
        batch: images per batch.
        epochs: passes over the crops.
        groups: `MODEL.GROUP_NORM.NUM_GROUPS`.
        width: channels per group; -1 to use `groups`.
        passes: that a batch of clips is divided into; 0 for crops.
    """

    norm: str
    batch: int = 32
    epochs: int = 5
    groups: int = 32
    width: int = -1
    passes: int = 0

    @property
    def config(self) -> str:
        return CLIPS_CONFIG if self.passes else CONFIG

    def keys(self, seed: int) -> list[str]:
        """Its config, as `KEY VALUE` pairs."""
        keys = {
            "MODEL.RESNETS.NORM": self.norm,
            "MODEL.GROUP_NORM.NUM_GROUPS": self.groups,
            "MODEL.GROUP_NORM.DIM_PER_GP": self.width,
            "SOLVER.IMS_PER_BATCH": self.batch,
            "PRETRAIN.EPOCHS": self.epochs,
            # The shares of the schedule after which the rate drops
            "PRETRAIN.STEPS": tuple(round(share * self.epochs, 2) for share in (0.77, 0.93)),
            "SOLVER.ACCUMULATE_ITERS": max(self.passes, 1),
            "SEED": seed,
        }
        return as_opts(keys)


BATCHES, GROUPINGS = (32, 8, 4, 2), (64, 32, 16, 8, 4, 2, 1)


def grouped(groups: int = 32, width: int = -1) -> Model:
    """A model of Table 3. LN is GN with one group, and IN with one channel per group."""
    norm = "LN" if groups == 1 else "IN" if width == 1 else "GN"
    own = norm != "GN"
    return Model(norm, 8, 2, 32 if own else groups, -1 if own else width)


def of_clips(norm: str, passes: int) -> Model:
    """A model of Table 8."""
    return Model(norm, 16, 24, passes=passes)


# Title: (columns, {row name: models, None for an empty cell})
Tables = dict[str, tuple[tuple[Any, ...], dict[str, list[Model | None]]]]
TABLES: Tables = {
    "Table 1: error at batch 32": (
        ("BN", "LN", "IN", "WN", "GN"),
        {"error": [Model(norm) for norm in ("BN", "LN", "IN", "WN", "GN")]},
    ),
    "Table 2: error by batch": (
        BATCHES,
        {
            **{norm: [Model(norm, batch) for batch in BATCHES] for norm in ("BN", "GN")},
            "BRN": [None, None, Model("BRN", 4), Model("BRN", 2)],
        },
    ),
    "Table 3: error of GN by grouping, at batch 8": (
        GROUPINGS,
        {
            "groups": [grouped(groups=n) for n in GROUPINGS],
            "channels per group": [grouped(width=n) for n in GROUPINGS],
        },
    ),
}
CLIP_TABLES: Tables = {
    "Table 8: error by clips per pass": (
        (16, 4, 2),
        {"BN": [of_clips("BN", n) for n in (1, 4, 8)], "GN": [of_clips("GN", 1), None, None]},
    )
}


def models_of(tables: Tables) -> list[Model]:
    """The models of tables, each once."""
    rows = [row for _, rows in tables.values() for row in rows.values()]
    return list(dict.fromkeys(model for row in rows for model in row if model))


def train(model: Model, seed: int, output: Path, opts: list[str]) -> dict[str, Any]:
    """Train one model, in a subprocess; returns its entry in `results.json`, errors in percent."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    folder = output / "running" / "-".join(map(str, (*model, seed)))
    shutil.rmtree(folder, ignore_errors=True)
    data = output / ("moving_shapes" if model.passes else "shapes/crops")
    keys = {
        "MODEL.DEVICE": "cpu",
        "OUTPUT_DIR": folder,
        "DATASETS.TRAIN": (f"{data}/train",),
        "DATASETS.TEST": (f"{data}/val",),
    }
    words = as_opts(keys)
    cfg = read_config(model.config, [*words, *model.keys(seed), *opts])
    seed_all_rng(seed)
    trainer = PretrainTrainer(cfg)
    trainer.train()
    last = metrics_of(folder)[-1]
    shutil.rmtree(folder)
    return {
        "model": model._asdict(),
        "seed": seed,
        "error": 100 - last["accuracy/top1"],
        "iterations": trainer.max_iter,
        "learning_rate": trainer.cfg.SOLVER.BASE_LR,
    }


def study(
    output: Path, seeds: int, opts: list[str], models: list[Model] | None = None
) -> dict[str, Any]:
    """Train all models that `results.json` does not have yet, and update it after every run.

    Args:
        output: folder of `results.json`, created if it does not exist.
        seeds: number of runs per model.
        opts: `KEY VALUE` overrides for every run.
        models: to train, all of crops or all of clips; None for those of `TABLES`.

    Returns:
        the content of `results.json`.

    Raises:
        InputError: if it has other settings.
    """
    path = output / "results.json"
    models = models or models_of(TABLES)
    clips = models[0].passes > 0
    numbers = CLIPS if clips else IMAGES
    settings = {"config": models[0].config, "opts": opts, "pictures": list(numbers)}
    results: dict[str, Any] = {"settings": settings, "versions": versions()}
    results |= {"git_commit": git_commit(), "runs": []}
    if path.exists():
        results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise InputError(f"{path} has other settings: choose another --output-dir")
    data = output / ("moving_shapes" if clips else "shapes")
    if not data.exists():
        output.mkdir(parents=True, exist_ok=True)
        (make_moving_shapes if clips else make_shapes)(data, *numbers)
    done = {(Model(**run["model"]), run["seed"]) for run in results["runs"]}
    todo = [(m, seed) for seed in range(seeds) for m in models if (m, seed) not in done]
    calls = [(model, seed, output, opts) for model, seed in todo]
    for i, run in enumerate(run_parallel(train, calls, 2), start=1):
        results["runs"].append(run)
        with write_whole(path) as file:
            file.write(json.dumps(results, indent=1) + "\n")
        name = " ".join(map(str, run["model"].values()))
        print(f"{i}/{len(todo)} {name}, seed {run['seed']}: {run['error']:.1f}%")
    return results


def errors(results: dict[str, Any], model: Model) -> list[float]:
    """Errors of all runs of a model, in percent."""
    return [run["error"] for run in results["runs"] if Model(**run["model"]) == model]


def markdown(results: dict[str, Any], tables: Tables = TABLES) -> str:
    """The tables: means over seeds, with the lowest and highest error."""
    lines = ["Errors in percent on validation data: mean over seeds (lowest to highest).", ""]
    for title, (columns, rows) in tables.items():
        cells = []
        for name, models in rows.items():
            values = [errors(results, model) if model else [] for model in models]
            texts = (f"{mean(e):.1f} ({min(e):.1f}–{max(e):.1f})" if e else "" for e in values)
            cells.append([name, *texts])
        lines += [title, "", markdown_table(["", *map(str, columns)], cells)]
    return "\n".join(lines)


def plot(results: dict[str, Any], tables: Tables = TABLES) -> Figure:
    """Plot one panel per table: means over seeds, with error bars from lowest to highest."""
    figure = Figure(figsize=(4 * len(tables), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (title, (columns, rows)) in zip(panels, tables.items(), strict=True):
        for (name, models), colour in zip(rows.items(), COLOURS, strict=False):
            filled = {str(c): m for c, m in zip(columns, models, strict=True) if m}
            values = [errors(results, model) for model in filled.values()]
            means = [mean(e) for e in values]
            spread = [[m - min(e) for m, e in zip(means, values, strict=True)]]
            spread.append([max(e) - m for m, e in zip(means, values, strict=True)])
            style = "o" if len(rows) == 1 else "o-"
            axes.errorbar([*filled], means, spread, fmt=style, label=name, color=colour, capsize=3)
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(rows) > 1:
            axes.legend(frameon=False)
    figure.axes[0].set_ylabel("error, %")
    return figure


def main() -> None:
    """Train, and write `results.json`, `results.md` and `results.png`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=EXAMPLE)
    add = parser.add_argument
    help_ = "folder for data and results (default output/study, or output/study_clips)"
    add("--output-dir", type=Path, metavar="FOLDER", help=help_)
    help_ = "training runs per model, with the seeds 0 to N - 1 (default %(default)s)"
    add("--seeds", type=int, default=2, metavar="N", help=help_)
    add("--clips", action="store_true", help="Table 8, on clips, instead of Tables 1 to 3")
    help_ = "KEY VALUE pairs that override the config of every run"
    add("opts", nargs=argparse.REMAINDER, help=help_)
    args = parser.parse_args()
    with exit_on_input_error():
        tables = CLIP_TABLES if args.clips else TABLES
        output = args.output_dir or Path("output", "study_clips" if args.clips else "study")
        results = study(output, args.seeds, args.opts, models_of(tables))
        (output / "results.md").write_text(markdown(results, tables))
        plot(results, tables).savefig(output / "results.png", dpi=120)
        print(f"done: {output / 'results.md'}")


if __name__ == "__main__":
    main()
