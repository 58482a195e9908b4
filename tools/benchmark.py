#!/usr/bin/env python3
"""GN's price: operators and whole detectors, gn_det's against their rivals, side by side.

Everything is measured in one process, in turns. Ratios are to Detectron2's own BN*. Without a GPU,
sizes are small, PyTorch's own kernels stand in for Triton's, and memory is what the forward pass
leaves for the backward pass.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

try:
    import torch
    import torch._dynamo
    import torch.nn.functional as F
    from studies.rivals import BASELINE, MODELS, Detector, build_rivals
    from studies.saved_bytes import saved_bytes
    from studies.timing import Times, interleave
    from torch import Tensor

    from gn_det.config import default_device
    from gn_det.engine.run_record import device_name, git_commit, versions
    from gn_det.layers import group_norm_act
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

DEVICE = default_device()
# Positions of the largest RoIs, whose groups a GPU keeps in registers: one pass is enough
ROI = 14 * 14
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def operator_shapes(images: int, height: int, width: int) -> Iterator[tuple[str, tuple, bool]]:
    """Name, (N, C, H, W) and whether a residual is added, of R50-FPN's norms."""
    yield "stem", (images, 64, height // 2, width // 2), False
    for i, channels in enumerate((64, 128, 256, 512), start=2):
        side = height // 2**i, width // 2**i
        yield f"res{i}", (images, channels, *side), False
        yield f"res{i}, wide", (images, 4 * channels, *side), True
    for i in range(2, 6):
        yield f"p{i}", (images, 256, height // 2**i, width // 2**i), False
    rois = (512, 128) if DEVICE == "cuda" else (64, 16)
    yield "box head", (images * rois[0], 256, 7, 7), False
    yield "mask head", (images * rois[1], 256, 14, 14), False


def operators() -> dict[str, Callable[..., Tensor]]:
    """relu(GN(x) * weight + bias + residual?), by whom it is computed."""

    def native(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        y = F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype))
        return F.relu_(y if residual is None else y + residual)

    found: dict[str, Callable[..., Tensor]] = {
        "fused": lambda x, w, b, r: group_norm_act(x, w, b, 32, 1e-5, r, True),
        "native": native,
    }
    if DEVICE == "cuda":
        found["compiled"] = torch.compile(native, dynamic=True)
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction
    except ImportError:
        return found

    def liger(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        flat = x.flatten(2)
        y = LigerGroupNormFunction.apply(flat, weight, bias, x.shape[1], 32, 1e-5).view_as(x)
        return F.relu_(y if residual is None else y + residual)

    return {**found, "Liger": liger}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy from memory to memory."""
    source = torch.empty(2**28 if DEVICE == "cuda" else 2**26, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copies = interleave({"copy": lambda: target.copy_(source)}, rounds=20, cold=True)
    return 2 * source.numel() / copies["copy"].median


def benchmark_operators(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds, and the share of a copy's bandwidth that the least traffic would take."""
    bandwidth, rows, functions = copy_bandwidth(), [], operators()
    warm_up = min(3, args.rounds)
    torch._dynamo.config.recompile_limit = 64
    for dtype in args.dtypes:
        for images in args.images:
            for name, shape, residual in operator_shapes(images, *args.size):
                x, r, dy = (torch.randn(shape, device=DEVICE, dtype=DTYPES[dtype]) for _ in "xrd")
                weight, bias = torch.randn(2, shape[1], device=DEVICE)
                inputs = [t.requires_grad_() for t in (x, weight, bias, r)]
                if not residual:
                    inputs[3] = None
                given = [t for t in inputs if t is not None]
                for both in (False, True):
                    steps = {
                        who: partial(_operate, function, inputs, given, dy if both else None)
                        for who, function in functions.items()
                    }
                    # Of the tensor's size: what is read and written, the residual's with it
                    passes = 3 + residual + (5 + 2 * residual) * both
                    if shape[2] * shape[3] <= ROI:
                        passes = 2 + residual + (3 + 2 * residual) * both
                    least = passes * x.numel() * x.element_size() / bandwidth
                    for who, times in interleave(steps, args.rounds, warm_up, cold=True).items():
                        row = {"dtype": dtype, "images": images, "layer": name, "operator": who}
                        way = "forward and backward" if both else "forward"
                        share = {"bandwidth": least / times.median, "spread": times.spread}
                        rows.append({**row, "way": way, "ms": 1e3 * times.median, **share})
    return rows


def _operate(
    function: Callable[..., Tensor], inputs: list, given: list[Tensor], dy: Tensor | None
) -> None:
    if dy is None:
        with torch.no_grad():
            function(*inputs)
    else:
        torch.autograd.grad(function(*inputs), given, dy)


def benchmark_detectors(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Training steps and inference of one detector and its rivals."""
    rows, warm_up = [], min(3, args.rounds)
    for dtype in args.dtypes:
        for images in args.images:
            torch._dynamo.reset()
            rivals = build_rivals(model, images, args.size, DTYPES[dtype], DEVICE, args.only)
            for way in ("train", "infer"):
                steps = {name: getattr(rival, way) for name, rival in rivals.items()}
                times = interleave(steps, args.rounds, warm_up)
                for name, rival in rivals.items():
                    row = {"model": model, "dtype": dtype, "images": images, "rival": name}
                    rows.append({**row, "way": way, **_figures(times, name, rival, images, way)})
    baselines = {_key(row): row for row in rows if row["rival"] == BASELINE}
    for row in rows:
        baseline = baselines[_key(row)]
        row["time ratio"] = row["seconds"] / baseline["seconds"]
        row["memory ratio"] = row["MiB"] / baseline["MiB"] if baseline["MiB"] else None
    return rows


def _figures(
    times: dict[str, Times], name: str, rival: Detector, images: int, way: str
) -> dict[str, Any]:
    mine = times[name]
    memory = mine.peak_mib + rival.resident_mib(way)
    if DEVICE == "cpu":
        memory = saved_bytes(rival.loss) / 2**20 if way == "train" else 0.0
    rate = {"images/s": images / mine.median, "seconds": mine.median, "spread": mine.spread}
    return {**rate, "MiB": memory}


def _key(row: dict[str, Any]) -> tuple:
    return row["model"], row["dtype"], row["images"], row["way"]


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    if not rows:
        return ""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row[c]) for c in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    small = DEVICE == "cpu"
    parts = ["operators", *MODELS]
    add = parser.add_argument
    add("--parts", nargs="+", choices=parts, default=parts)
    size = [128, 192] if small else [800, 1344]
    add("--size", nargs=2, type=int, default=size, metavar=("H", "W"), help="of the pictures")
    add("--images", nargs="+", type=int, default=[1] if small else [1, 2], help="a batch")
    add("--dtypes", nargs="+", choices=DTYPES, default=["fp32"] if small else list(DTYPES))
    add("--rounds", type=int, default=10 if small else 30, help="that every rival is timed in")
    add(
        "--only", nargs="+", default=[], metavar="RIVAL", help="beside the baseline; all by default"
    )
    add("--output-dir", type=Path, default=Path("output/benchmark"), metavar="FOLDER")
    return parser.parse_args()


def main() -> None:
    """Measure, and write results.json and results.md."""
    args = parse()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {"device": device_name(DEVICE), **versions(), "commit": git_commit()}
    facts |= {"TF32 convolutions": str(torch.backends.cudnn.allow_tf32)}
    facts |= {"date": time.strftime("%Y-%m-%d"), "size": "x".join(map(str, args.size))}
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    results: dict[str, Any] = {"facts": facts}
    text = f"{told}\n"
    print(told, flush=True)
    for part in args.parts:
        if part == "operators":
            results[part] = benchmark_operators(args)
        else:
            results[part] = benchmark_detectors(args, part)
        text += f"\n{table(results[part])}"
        print(f"\n{table(results[part])}", flush=True)
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output_dir / "results.md").write_text(text)


if __name__ == "__main__":
    main()
