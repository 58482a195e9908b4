#!/usr/bin/env python3
"""Benchmark time and memory of GN operators and detectors in gn_det and other implementations.

All implementations are timed in turns, in one process. Ratios are relative to Detectron2's BN*. On
a CPU the default sizes are small, PyTorch's kernels replace Triton's, and memory means the bytes
that the forward pass saves for the backward pass.
"""

import argparse
import json
import math
import time
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    import torch._dynamo
    from studies import operators
    from studies.rivals import BASELINE, COMPILED, Detector, build_rivals, rival_names
    from studies.saved_bytes import saved_bytes
    from studies.tables import markdown_table
    from studies.timing import Times, gpu_work, interleave

    from gn_det.config import default_device
    from gn_det.engine.run_record import device_name, git_commit, versions
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

DEVICE = default_device()
EXAMPLE = "example: python tools/benchmark.py --everything --minutes 40"
OPERATORS = "operators"
PARTS = ["R50-FPN", OPERATORS, "R50-C4"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Row = dict[str, Any]


class Unit(NamedTuple):
    """What is measured between two looks at the clock."""

    part: str
    dtype: str
    images: int
    names: Collection[str]


def names_of(part: str) -> list[str]:
    """All implementations that a part can measure."""
    return [*operators.operators()] if part == OPERATORS else rival_names(part)


def units(args: argparse.Namespace) -> Iterator[Unit]:
    """All measurements, the most important ones first, and those that compile last."""
    settings = list(product(args.dtypes, args.images, args.parts))
    for compiled in (False, True):
        for dtype, images, part in settings:
            names = [name for name in names_of(part) if not args.only or name in args.only]
            names = [name for name in names if (name in (COMPILED, operators.COMPILED)) == compiled]
            if names and not (compiled and args.quick):
                yield Unit(part, dtype, images, names)


def measure(unit: Unit, args: argparse.Namespace) -> Iterator[list[Row]]:
    """Tables of one unit, as soon as each is complete."""
    dtype = DTYPES[unit.dtype]
    if unit.part == OPERATORS:
        functions = {k: f for k, f in operators.operators().items() if k in unit.names}
        rows = operators.operator_rows(unit.images, args.size, dtype, functions, args.rounds)
        yield [{"dtype": unit.dtype, **row} for row in rows]
        return
    torch._dynamo.reset()
    names = {BASELINE, *unit.names}
    rivals = build_rivals(unit.part, unit.images, args.size, dtype, DEVICE, names)
    for way in ("train", "infer"):
        found = _detector_rows(rivals, way, unit.images, args.rounds)
        yield [{"model": unit.part, "dtype": unit.dtype, **row} for row in found]


def _detector_rows(
    rivals: dict[str, Detector], way: str, images: int, rounds: int
) -> Iterator[Row]:
    """Time one way of all detectors; see `Times` for those that run out of memory."""
    steps = {name: getattr(rival, way) for name, rival in rivals.items()}
    times = interleave(steps, rounds, warm_up=min(3, rounds))
    memory = {name: _mib(times[name], rival, way) for name, rival in rivals.items()}
    for name in rivals:
        mine, baseline = times[name], times[BASELINE]
        row: Row = {"images": images, "rival": name, "way": way, "images/s": images / mine.median}
        row |= {"seconds": mine.median, "spread": mine.spread, "MiB": memory[name]}
        row["time ratio"] = mine.median / baseline.median
        row["memory ratio"] = memory[name] / memory[BASELINE] if memory[BASELINE] else None
        if DEVICE == "cuda" and not math.isnan(mine.median):
            work = gpu_work(steps[name])
            row |= {"GPU busy ms": 1e3 * work["busy"], "CPU ms": 1e3 * work["cpu"]}
            row["launches"] = work["launches"]
        yield row


def _mib(times: Times, rival: Detector, way: str) -> float:
    if DEVICE == "cpu":
        return saved_bytes(rival.loss) / 2**20 if way == "train" else 0.0
    return times.peak_mib + rival.resident_mib(way)


def table(rows: list[Row]) -> str:
    """Format result rows as a Markdown table; "" without rows."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "out of memory" if math.isnan(value) else f"{value:.3g}"
        return "" if value is None else str(value)

    columns = list(dict.fromkeys(column for row in rows for column in row))
    return markdown_table(columns, ([cell(row.get(c)) for c in columns] for row in rows))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=EXAMPLE)
    cpu = DEVICE == "cpu"
    add = parser.add_argument
    help_ = "all parts, precisions and numbers of images, and everything that needs a compiler"
    add("--everything", action="store_true", help=help_)
    help_ = "start no measurement after this time (default: no limit)"
    add("--minutes", type=float, default=math.inf, metavar="M", help=help_)
    help_ = "what to benchmark (default R50-FPN operators)"
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=help_)
    size = [128, 192] if cpu else [800, 1344]
    help_ = "image height and width in pixels (default 128 192, on a GPU 800 1344)"
    add("--size", nargs=2, type=int, default=size, metavar=("H", "W"), help=help_)
    help_ = "images per batch; several values are measured in turn (default 1, on a GPU 2)"
    add("--images", nargs="+", type=int, metavar="N", help=help_)
    help_ = "precisions, bf16 or fp32 (default fp32, on a GPU bf16)"
    add("--dtypes", nargs="+", choices=DTYPES, metavar="TYPE", help=help_)
    help_ = "timed repetitions of each measurement (default 10, on a GPU 30)"
    add("--rounds", type=int, default=10 if cpu else 30, metavar="N", help=help_)
    help_ = "implementations to measure beside the baseline, by name (default: all)"
    add("--only", nargs="+", default=[], metavar="RIVAL", help=help_)
    help_ = "folder of results.json and results.md (default %(default)s)"
    add("--output-dir", type=Path, default=Path("output/benchmark"), metavar="FOLDER", help=help_)
    args = parser.parse_args()
    args.size = tuple(args.size)
    args.quick = not args.everything and not args.only
    args.parts = args.parts or (PARTS if args.everything else PARTS[:2])
    args.dtypes = args.dtypes or ([*DTYPES] if args.everything else ["fp32" if cpu else "bf16"])
    args.images = args.images or ([2, 1] if args.everything else [1 if cpu else 2])
    known = [name for part in args.parts for name in names_of(part)]
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"--only {unknown[0]!r} is none of: {'; '.join(dict.fromkeys(known))}")
    return args


def main() -> None:
    """Run the benchmark, and write `results.json` and `results.md` after every measurement."""
    args = parse()
    deadline = time.monotonic() + 60 * args.minutes
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {"device": device_name(DEVICE), **versions(), "commit": git_commit()}
    facts |= {"TF32 convolutions": str(torch.backends.cudnn.allow_tf32)}
    facts |= {"date": time.strftime("%Y-%m-%d"), "size": "x".join(map(str, args.size))}
    summary = ", ".join(f"{name} {value}" for name, value in facts.items())
    print(summary, flush=True)
    results: dict[str, Any] = {"facts": facts}
    text = f"{summary}\n"
    left_out = []
    for unit in units(args):
        if time.monotonic() > deadline:
            left_out.append(f"{unit.part}, {unit.dtype}, {unit.images} images")
            continue
        for rows in measure(unit, args):
            text += f"\n{table(rows)}"
            print(f"\n{table(rows)}", flush=True)
            results.setdefault(unit.part, []).extend(map(_without_nan, rows))
            (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (args.output_dir / "results.md").write_text(text)
    if left_out:
        print(f"Not measured, as --minutes {args.minutes:g} had passed: {'; '.join(left_out)}")


def _without_nan(row: Row) -> Row:
    """JSON has no NaN: what ran out of memory is null there."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


if __name__ == "__main__":
    main()
