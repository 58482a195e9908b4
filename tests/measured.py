"""The tables of every README.md that hold measured numbers, as their files of results give them."""

import json
import re
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev
from typing import Any

from readmes import ROOT, Page, Table
from torch import nn

from gn_det.config_file import read_config
from gn_det.modeling import build_on_meta_device

FOLDER = ROOT / "tools/results"
RESULTS, CONFIGS = "tools/results/README.md", "configs/README.md"
SLOW = "backbone at a tenth of the rate"
# Of seeds: the 97.5 % quantile of Student's t with one degree of freedom less
QUANTILES = {2: 12.706, 3: 4.303}


@dataclass(frozen=True)
class Measured:
    """A table, found by its page and head, and what gives its rows."""

    page: str
    head: tuple[str, ...]
    expected: Callable[[Table], list[list[str]]]


@cache
def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


# The study of calibration: "DATA, AP, MODEL, SEED" -> {"box AP": ..., "mask AP": ...}


def seeds_of(file: str, key: str) -> dict[int, Mapping[str, float]]:
    """The runs of a model by seed."""
    runs = load(file)
    return {seed: runs[f"{key}, {seed}"] for seed in range(3) if f"{key}, {seed}" in runs}


def cell(file: str, key: str, measures: Sequence[str] = ("box AP", "mask AP"), digits=1) -> str:
    """Mean ± standard deviation of each measure, and the number of seeds where it is not 3."""
    runs = seeds_of(file, key)
    if not runs:
        return ""
    parts = []
    for measure in measures:
        values = [run[measure] for run in runs.values()]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        parts.append(f"{mean(values):.{digits}f}{spread}")
    note = "" if len(runs) == 3 else f" ({len(runs)} seed{'s' * (len(runs) > 1)})"
    return " / ".join(parts) + note


def signed(value: float) -> str:
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if float(text[1:]) == 0 else text


def paired_interval(one: Mapping[int, Any], two: Mapping[int, Any]) -> str:
    """The mean difference in box AP over the seeds of both, with its 95% t interval."""
    gaps = [one[seed]["box AP"] - two[seed]["box AP"] for seed in one.keys() & two.keys()]
    half = QUANTILES[len(gaps)] * stdev(gaps) / len(gaps) ** 0.5
    middle = mean(gaps)
    return f"{signed(middle)} ({signed(middle - half)} to {signed(middle + half)})"


# Comparisons: by norm the AP of each seed, and the differences


def comparisons(table: Table) -> list[list[str]]:
    rows = []
    for name in table.column(0):
        if name in PAPER:
            bn, gn = map(published_ap, PAPER[name])
            gaps = (signed(float(b) - float(a)) for a, b in zip(bn, gn, strict=True))
            rows.append([name, " / ".join(bn), "", " / ".join(gn), " / ".join(gaps)])
            continue
        found = load("compare.json")["results"][name.replace("`", "")]
        cells = [compared(found["models"].get(norm)) for norm in ("BN*", "BN*/GN", "GN")]
        pair = [g for g in found["differences"] if (g["norm"], g["baseline"]) == ("GN", "BN*")]
        rows.append([name, *cells, ", ".join(map(interval_of, pair))])
    return rows


def trials(key: str) -> Callable[[Table], list[list[str]]]:
    """Box AP / mask AP of each norm at each learning rate, or at each rate and length."""

    def expected(table: Table) -> list[list[str]]:
        found = {}
        for t in load("compare.json")[key]:
            length = f", {t['iterations']}" if "iterations" in t else ""
            aps = f"{t['box AP']:.1f} / {t['mask AP']:.1f}" if "box AP" in t else "diverged"
            found[t["norm"], f"{t['rate']:g}{length}"] = aps
        norms = ("BN*", "BN*/GN", "GN")
        return [[name, *(found[norm, name] for norm in norms)] for name in table.column(0)]

    return expected


def rates(table: Table) -> list[list[str]]:
    """One seed's box AP / mask AP at each learning rate and factor of the backbone's."""
    found = {
        (f"{run['norm']}, {run['rate']:g}", f"{run['factor']:g}"): run
        for run in load("compare.json")["rates on nuclei, 400"]["runs"]
    }
    runs = [(row[0], row[1], found[row[0], row[1]]) for row in table.rows]
    return [
        [name, factor, f"{run['box AP']:.1f} / {run['mask AP']:.1f}"] for name, factor, run in runs
    ]


def compared(model: Mapping[str, Sequence[float]] | None) -> str:
    """Mean ± standard deviation of box AP and mask AP over the seeds of a model."""
    if model is None:
        return ""
    values = (model[kind] for kind in ("box AP", "mask AP"))
    return " / ".join(f"{mean(v):.1f} ± {stdev(v):.1f}" for v in values)


# README's rows of the paper: from the recipes' table, of BN* and of GN
PAPER = {
    "the paper, COCO: R50-C4 2x": ("R_50_C4_noaug_2x", "R_50_C4_noaug_2x_gn"),
    "the paper, COCO: R50-FPN 2x, same box head": (
        *("R_50_FPN_noaug_2x_4conv1fc", "R_50_FPN_noaug_2x_gn"),
    ),
}


def published_ap(config: str) -> list[str]:
    """Box and mask AP of a row of the paper."""
    (recipes,) = (t for t in Page(CONFIGS).tables if t.head[0] == "table, model")
    (cells,) = {row[2] for row in recipes.rows if row[1] == f"`mask_rcnn_{config}`"}
    return [part.split()[0] for part in cells.split(" / ")]


def as_good_as(table: Table) -> list[list[str]]:
    file = "study_calibration_2026-11-25.json"
    gn = f"GN distilled, 16 channels per group, FPN and heads 32 groups, {SLOW}"
    rows = []
    for name in table.column(0):
        data, iterations = name.replace("nuclei", "dsb256").replace("`", "").split(", ")
        keys = [f"{data}, AP, {m}, {iterations} iterations" for m in ("BN*", f"BN*, {SLOW}", gn)]
        _, bn, ours = (seeds_of(file, key) for key in keys)
        rows.append([name, *(cell(file, key) for key in keys), paired_interval(ours, bn)])
    return rows


WIDTH_16 = "GN distilled, 16 channels per group"
RECIPE = {
    "BN*, 16 channels per group in FPN and heads": "BN*, FPN and heads 16 channels per group",
    "GN, 16 channels per group everywhere": WIDTH_16,
    "GN, 32 channels per group; slow": (
        f"GN distilled, 32 channels per group, FPN and heads 32 groups, {SLOW}"
    ),
    "GN, 16 groups everywhere; slow": f"GN distilled, 16 groups everywhere, {SLOW}",
    "GN, 32 groups everywhere": "GN distilled",
    "GN, 16 channels per group; slow, gamma and beta at a hundredth": (
        f"{WIDTH_16}, FPN and heads 32 groups, the backbone's filters at a tenth of the rate and "
        "its gamma and beta at a hundredth"
    ),
    "GN, 16 channels per group; slow, distilled for 900 steps on 265 images": (
        "GN distilled for 900 steps on all pictures, 16 channels per group, FPN and heads 32 "
        f"groups, {SLOW}"
    ),
    "GN, 16 channels per group; stem and res2 trained": (
        f"{WIDTH_16}, FPN and heads 32 groups, stem and res2 trained, filters of twice He's scale "
        "and gamma and beta at a tenth of the rate"
    ),
    **{
        f"GN, {grouping}; filters at a {part} of the rate": (
            f"{model}, the backbone's filters at a {part} of the rate"
        )
        for part in ("third", "tenth")
        for grouping, model in (
            ("16 channels per group", f"{WIDTH_16}, FPN and heads 32 groups"),
            ("32 groups everywhere", "GN distilled"),
        )
    },
}


def recipe(iterations: int) -> Callable[[Table], list[list[str]]]:
    def expected(table: Table) -> list[list[str]]:
        file = "study_calibration_2026-11-25.json"
        end = f"{iterations} iterations"
        return [
            [name, *(cell(file, f"{d}, AP, {RECIPE[name]}, {end}") for d in ("dsb256", "shapes"))]
            for name in table.column(0)
        ]

    return expected


CALIBRATION = {
    "BN*": "BN*",
    "GN, old, 900 steps": "GN distilled",
    "GN, 300 steps": "GN distilled anew",
    "GN, 300 steps, 16 channels per group": "GN distilled anew, 16 channels per group",
    "GN, calibrated, 16 channels per group": "GN calibrated anew, 16 channels per group",
}


def calibration(_: Table) -> list[list[str]]:
    file = "study_calibration_2026-11-24.json"
    rows = []
    for name, model in CALIBRATION.items():
        boxes = [run["box AP"] for run in seeds_of(file, f"dsb256, AP, {model}").values()]
        each = ", ".join(f"{box:.1f}" for box in boxes)
        rows.append([name, cell(file, f"dsb256, AP, {model}"), each])
    return rows


# What is said of BN* and of GN's backbone
TRAININGS = {
    "whole backbone frozen": ("whole backbone frozen",) * 2,
    "`SOLVER.NORM_LR_FACTOR 0.1`": (
        "gamma and beta of the heads at a tenth of the rate",
        "gamma and beta at a tenth of the rate",
    ),
    "500 iterations": ("500 iterations",) * 2,
    **{
        f"backbone's {what}": ("", f"the backbone's {what}")
        for what in (
            *("gamma and beta at a tenth of the rate", "gamma and beta fixed"),
            *("filters at 0.3 of the rate", "filters at 3 times the rate"),
        )
    },
    "stem and res2 trained": ("", "stem and res2 trained"),
}


def trainings(_: Table) -> list[list[str]]:
    file = "study_calibration_2026-11-24.json"
    return [
        [
            name,
            *(
                cell(file, f"dsb256, AP, {m}, {how}")
                for m, how in zip(("BN*", "GN distilled"), ways, strict=True)
            ),
        ]
        for name, ways in TRAININGS.items()
    ]


def all_ways(table: Table) -> list[list[str]]:
    file, rows = "study_calibration.json", []
    for name in table.column(0):
        model = name.replace("images", "pictures").replace("distilled, 300 steps", "distilled")
        model = model.replace(
            "the moments that gamma and beta stand for", "what gamma and beta promise"
        )
        probe = [cell(file, f"probe, probe, {model}", [m], 2) for m in ("AUC", "correlation")]
        tuned = [cell(file, f"{data}, AP, {model}") for data in ("dsb256", "shapes")]
        rows.append([name, *probe, *tuned])
    models = {key.rpartition(", ")[0].split(", ", 2)[2] for key in load(file)}
    assert len(rows) == len(models), "every model of the file has its row"
    return rows


def errors(file: str, **model: object) -> str:
    """Mean (lowest to highest) error of a model."""
    runs = [r for r in load(file)["runs"] if model.items() <= r["model"].items()]
    found = [run["error"] for run in runs]
    return f"{mean(found):.1f} ({min(found):.1f}–{max(found):.1f})" if found else ""


def norms(table: Table) -> list[list[str]]:
    rows = []
    for norm in table.column(0):
        same = {"norm": norm, "epochs": 5, "groups": 32, "width": -1}
        batches = map(int, table.head[1:])
        rows.append([norm, *(errors("study_norms.json", batch=n, **same) for n in batches)])
    return rows


def groupings(table: Table) -> list[list[str]]:
    rows = []
    for name in table.column(0):
        key = {"groups": "groups", "channels": "width"}[name]
        cells = []
        for number in map(int, table.head[1:]):
            # LN is GN with one group, and IN with one channel per group
            own = {"norm": "GN", "groups": 32, "width": -1} | {key: number}
            model = {"norm": "LN" if key == "groups" else "IN"} if number == 1 else own
            cells.append(errors("study_norms.json", batch=8, epochs=2, **model))
        rows.append([name, *cells])
    return rows


def clips(table: Table) -> list[list[str]]:
    passes = [16 // int(number) for number in table.head[1:]]
    file = "study_clips.json"
    return [[n, *(errors(file, norm=n, passes=p) for p in passes)] for n in table.column(0)]


def claims(table: Table) -> list[list[str]]:
    """Verdicts, counted in the results."""
    verdicts = ("holds", "does not hold", "undecided", "too little learned")
    found = load("replicate.json")["claims"]
    return [
        [word, *(str(sum(c[word]["verdict"] == v for c in found)) for v in verdicts)]
        for word in ("box", "mask")
    ]


def features(table: Table) -> list[list[str]]:
    shares = load("feature_distance.json")["percent"]
    return [[n, *(f"{shares[n][s]:.1f}%" for s in table.head[1:])] for n in table.column(0)]


def ratios(table: Table) -> list[list[str]]:
    """Memory and time of a training step and time of inference, relative to Detectron2's BN*."""
    found = {(row["rival"], row["way"]): row for row in load("benchmark.json")["R50-FPN"]}
    rows = []
    for name in table.column(0):
        rival = name.replace("'s ", " ").replace("`", "")
        train, infer = (found[rival, way] for way in ("train", "infer"))
        values = train["memory ratio"], train["time ratio"], infer["time ratio"]
        rows.append([name, *(f"{value:.2f}" for value in values)])
    return rows


def ratios_on_a_gpu(table: Table) -> list[list[str]]:
    """Peak memory, GPU time and time of a training step, and time of inference, over BN*'s."""
    found = {(row["rival"], row["way"]): row for row in load("benchmark_h200.json")["R50-FPN"]}
    baseline = found["Detectron2 BN*", "train"]
    rows = []
    for name in table.column(0):
        rival = name.replace("'s ", " ").replace("`", "")
        train, infer = (found[rival, way] for way in ("train", "infer"))
        busy = train["GPU busy ms"] / baseline["GPU busy ms"]
        values = train["memory ratio"], busy, train["time ratio"], infer["time ratio"]
        rows.append([name, *(f"{value:.2f}" for value in values)])
    return rows


def bytes_kept(table: Table) -> list[list[str]]:
    """Float32 as tests/modeling/test_fused.py measures it, bfloat16 as half of that."""
    text = (ROOT / "tests/modeling/test_fused.py").read_text()
    (levels,) = re.findall(r"^BOTTLENECK = (\{.*\})$", text, re.MULTILINE)
    (frozen,) = re.findall(r"== pytest.approx\((\d+), rel=0.02\)", text)
    kept = {**literal_eval(levels), "BN*": int(frozen)}
    rows = [list(table.rows[0])]
    for name, *_, what in table.rows[1:]:
        own = kept[name.split(", ")[0].strip("`")]
        rows.append([name, str(own), str(own // 2), what])
    return rows


def communication(table: Table) -> list[list[str]]:
    """Counted in the models: SyncBN gathers and reduces once a layer; see `SyncBatchNorm`."""
    names = (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x_syncbn",
        "Detectron1-Comparisons/scratch_mask_rcnn_R_50_FPN_noaug_3x_syncbn",
    )
    layers, sizes, gradients = ["0"], ["0"], []
    for name in names:
        cfg = read_config(f"{name}.yaml")
        model = build_on_meta_device(cfg)
        sync = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
        layers.append(str(len(sync)))
        # Mean, variance and count forward, two sums backward, in float32
        moved = sum(4 * (2 * m.num_features + 1 + 2 * m.num_features) for m in sync)
        sizes.append(f"{moved / 2**20:.1f} MiB")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        gradients.append(f"{4 * trained / 2**20:.0f} MiB")
    messages = [str(2 * int(count)) for count in layers]
    rows = [layers, messages, sizes, [gradients[0], *gradients]]
    return [[name, *cells] for name, cells in zip(table.column(0), rows, strict=True)]


# The study of GN's own recipe: one entry for each run


def tried(**wanted: object) -> str:
    """Box AP / mask AP of the run of seed 0 with these settings; empty without one."""
    runs = [r for r in load("recipe.json")["runs"] if {**wanted, "seed": 0}.items() <= r.items()]
    assert len(runs) < 2, wanted
    return " / ".join(f"{runs[0][kind]:.1f}" for kind in ("box AP", "mask AP")) if runs else ""


def schedule_of(words: str, keys: Sequence[str]) -> dict[str, float]:
    """Settings from text such as "160, 0.02, 4"."""
    return dict(zip(keys, map(float, words.split(", ")), strict=True))


def narrow_heads(table: Table) -> list[list[str]]:
    rows = []
    for channels, schedule, factor, *_ in table.rows:
        shared = {"dataset": "shapes", "channels": int(channels), "factor": float(factor)}
        shared |= schedule_of(schedule, ("iterations", "rate"))
        gn = {"norm": "GN", "heads_channels_per_group": int(channels) // 32}
        cells = [tried(**shared, norm="BN*"), tried(**shared, **gn)]
        rows.append([channels, schedule, factor, *cells])
    return rows


def heads_grouping(table: Table) -> list[list[str]]:
    rows = []
    for data, channels, schedule, *_ in table.rows:
        dataset = "dsb256" if data == "nuclei" else data.strip("`")
        shared = {"dataset": dataset, "channels": int(channels)}
        shared |= schedule_of(schedule, ("iterations", "rate", "factor"))
        widths = (8, 4, 2)
        cells = [tried(**shared, heads_channels_per_group=width) for width in widths]
        rows.append([data, channels, schedule, *cells])
    return rows


def demo(_: Table) -> list[list[str]]:
    results = load("demo.json")
    rows = []
    for model in results["models"]:
        aps = [f"{model[kind]['AP']:.1f}" for kind in ("bbox", "segm")]
        gaps = {g["of"]: g for g in results["differences"] if g["norm"] == model["model"]}
        rows.append([model["model"], *aps, *(interval_of(gaps.get(of)) for of in ("box", "mask"))])
    return rows


def interval_of(gap: Mapping[str, float] | None) -> str:
    """A difference with its 95% interval."""
    if gap is None:
        return ""
    return f"{signed(gap['mean'])} ({signed(gap['low'])} to {signed(gap['high'])})"


BACKBONES = ("backbone", "nuclei", "`shapes`")
TABLES = [
    Measured(
        "tools/README.md",
        ("model", "box AP", "mask AP", "box AP above BN*", "mask AP above BN*"),
        demo,
    ),
    Measured(
        "README.md",
        ("dataset, iterations", "BN*", "BN*, GN in FPN and heads", "GN", "GN − BN*"),
        comparisons,
    ),
    *(
        Measured(RESULTS, (head, "BN*", "BN*, GN in FPN and heads", "GN"), trials(key))
        for head, key in (
            ("learning rate", "trials on nuclei"),
            ("learning rate, iterations", "trials on nuclei, 400"),
        )
    ),
    Measured(RESULTS, ("norm, learning rate", "factor", "box AP / mask AP"), rates),
    Measured(
        RESULTS,
        ("after iterations", "BN*", "BN*, slow", "GN, slow", "GN − BN*, slow"),
        as_good_as,
    ),
    Measured(
        RESULTS,
        ("channels of FPN and heads", "iterations, rate", "factor", "BN*", "GN"),
        narrow_heads,
    ),
    Measured(
        RESULTS,
        (
            *("dataset", "channels of FPN and heads", "iterations, rate, factor"),
            *("8 channels per group", "4", "2"),
        ),
        heads_grouping,
    ),
    Measured(RESULTS, ("after 1000 iterations", *BACKBONES[1:]), recipe(1000)),
    Measured(RESULTS, ("after 250 iterations", *BACKBONES[1:]), recipe(250)),
    Measured(RESULTS, ("backbone", "box AP / mask AP", "box AP of seeds 0, 1, 2"), calibration),
    Measured(RESULTS, ("training", "BN*", "GN"), trainings),
    Measured(RESULTS, ("backbone", "probe AUC", "correlation", "nuclei", "`shapes`"), all_ways),
    Measured(RESULTS, ("batch size", "32", "8", "4", "2"), norms),
    Measured(RESULTS, ("GN", "64", "32", "16", "8", "4", "2", "1"), groupings),
    Measured(RESULTS, ("clips per pass", "16", "4", "2"), clips),
    Measured(
        RESULTS,
        ("AP", "hold", "do not hold", "undecided", "too little learned"),
        claims,
    ),
    Measured(
        "gn_det/checkpoint/README.md",
        ("share of the BN features' variance that is missed", "res2", "res3", "res4", "res5"),
        features,
    ),
    Measured(
        "gn_det/layers/README.md",
        ("relative to Detectron2's BN*", "memory", "training step", "inference"),
        ratios,
    ),
    Measured(
        "gn_det/layers/README.md",
        ("relative to Detectron2's BN*", "memory", "GPU time", "training step", "inference"),
        ratios_on_a_gpu,
    ),
    Measured(
        "gn_det/layers/README.md", ("`RECOMPUTE`", "float32", "bfloat16", "recomputed"), bytes_kept
    ),
    Measured(
        "gn_det/engine/README.md",
        ("per step and GPU", "GN, BN*", "SyncBN, fine-tuning", "SyncBN, from scratch"),
        communication,
    ),
]
# Tables of what others measured, and README's list of what was run
PUBLISHED = {
    (CONFIGS, ("table, model", "config", "paper", "Detectron")),
    (CONFIGS, ("config", "Detectron2, box AP / mask AP")),
    (CONFIGS, ("model", "box AP / mask AP", "in this project")),
    (CONFIGS, ("config", "clips per GPU", "paper", "here")),
    ("README.md", ("what", "run", "when")),
}
