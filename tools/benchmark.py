#!/usr/bin/env python3
"""Benchmark time and memory of GN operators and detectors in gn_det and other implementations.

All implementations are timed in turns, in one process. Ratios are relative to Detectron2's BN*. On
a CPU the default sizes are small, PyTorch's kernels replace Triton's, and memory means the bytes
that the forward pass saves for the backward pass.
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
    from studies.tables import markdown_table
    from studies.timing import Times, interleave
    from torch import Tensor

    from gn_det.config import default_device
    from gn_det.engine.run_record import device_name, git_commit, versions
    from gn_det.layers import group_norm_act
except ImportError as error:
    raise SystemExit(f"error: {error}") from None

DEVICE = default_device()
EXAMPLE = "example: python tools/benchmark.py --parts operators --dtypes bf16 --rounds 10"
# Up to this H * W a group fits in a GPU's registers, so that the kernel reads the input only once
ROI = 14 * 14
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def operator_shapes(images: int, height: int, width: int) -> Iterator[tuple[str, tuple, bool]]:
    """Shapes of the norm layers of an R50-FPN Mask R-CNN.

    Args:
        images: per batch.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Yields:
        layer name, (N, C, H, W), and whether a residual is added.
    """
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
    """Implementations by name of relu(GN(x) * weight + bias + residual), residual optional."""

    def native(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        y = F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype))
        return F.relu_(y if residual is None else y + residual)

    functions: dict[str, Callable[..., Tensor]] = {
        "fused": lambda x, w, b, r: group_norm_act(x, w, b, 32, 1e-5, r, True),
        "native": native,
    }
    if DEVICE == "cuda":
        functions["compiled"] = torch.compile(native, dynamic=True)
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction
    except ImportError:
        return functions

    def liger(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        flat = x.flatten(2)
        y = LigerGroupNormFunction.apply(flat, weight, bias, x.shape[1], 32, 1e-5).view_as(x)
        return F.relu_(y if residual is None else y + residual)

    return {**functions, "Liger": liger}


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy in device memory."""
    source = torch.empty(2**28 if DEVICE == "cuda" else 2**26, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copies = interleave({"copy": lambda: target.copy_(source)}, rounds=20, cold=True)
    return 2 * source.numel() / copies["copy"].median


def benchmark_operators(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all operators.

    Returns:
        one row for each setting and operator, with "ms" and "bandwidth". The latter is the minimum
        memory traffic per second, as a fraction of the bandwidth of a copy.
    """
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
                present = [t for t in inputs if t is not None]
                for both in (False, True):
                    steps = {
                        operator: partial(_operate, function, inputs, present, dy if both else None)
                        for operator, function in functions.items()
                    }
                    # Tensors read and written at least, each of the size of x
                    passes = 3 + residual + (5 + 2 * residual) * both
                    if shape[2] * shape[3] <= ROI:
                        passes = 2 + residual + (3 + 2 * residual) * both
                    least = passes * x.numel() * x.element_size() / bandwidth
                    timed = interleave(steps, args.rounds, warm_up, cold=True)
                    for operator, times in timed.items():
                        row = {"dtype": dtype, "images": images, "layer": name}
                        row["operator"] = operator
                        way = "forward and backward" if both else "forward"
                        share = {"bandwidth": least / times.median, "spread": times.spread}
                        rows.append({**row, "way": way, "ms": 1e3 * times.median, **share})
    return rows


def _operate(
    function: Callable[..., Tensor], inputs: list, present: list[Tensor], dy: Tensor | None
) -> None:
    """Run an operator forward, and backward if `dy` is given."""
    if dy is None:
        with torch.no_grad():
            function(*inputs)
    else:
        torch.autograd.grad(function(*inputs), present, dy)


def benchmark_detectors(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Time training steps and inference of all implementations of one detector.

    Args:
        args: as `parse` returns them.
        model: one of `MODELS`.

    Returns:
        one row for each setting and implementation, with ratios to `BASELINE`.
    """
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
    """Format result rows as a Markdown table; "" without rows."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    if not rows:
        return ""
    columns = list(rows[0])
    return markdown_table(columns, ([cell(row[c]) for c in columns] for row in rows))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=EXAMPLE)
    cpu = DEVICE == "cpu"
    parts = ["operators", *MODELS]
    add = parser.add_argument
    help_ = "what to benchmark (default: all)"
    add("--parts", nargs="+", choices=parts, default=parts, help=help_)
    size = [128, 192] if cpu else [800, 1344]
    help_ = "image height and width in pixels (default 128 192, on a GPU 800 1344)"
    add("--size", nargs=2, type=int, default=size, metavar=("H", "W"), help=help_)
    help_ = "images per batch; several values are measured in turn (default 1, on a GPU 1 2)"
    add("--images", nargs="+", type=int, default=[1] if cpu else [1, 2], metavar="N", help=help_)
    help_ = "precisions (default fp32, on a GPU fp32 bf16)"
    dtypes = ["fp32"] if cpu else list(DTYPES)
    add("--dtypes", nargs="+", choices=DTYPES, default=dtypes, help=help_)
    help_ = "timed repetitions of each measurement (default 10, on a GPU 30)"
    add("--rounds", type=int, default=10 if cpu else 30, metavar="N", help=help_)
    help_ = "detector implementations to measure beside the baseline, by name (default: all)"
    add("--only", nargs="+", default=[], metavar="RIVAL", help=help_)
    help_ = "folder of results.json and results.md (default %(default)s)"
    add("--output-dir", type=Path, default=Path("output/benchmark"), metavar="FOLDER", help=help_)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, and write `results.json` and `results.md`."""
    args = parse()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {"device": device_name(DEVICE), **versions(), "commit": git_commit()}
    facts |= {"TF32 convolutions": str(torch.backends.cudnn.allow_tf32)}
    facts |= {"date": time.strftime("%Y-%m-%d"), "size": "x".join(map(str, args.size))}
    summary = ", ".join(f"{name} {value}" for name, value in facts.items())
    results: dict[str, Any] = {"facts": facts}
    text = f"{summary}\n"
    print(summary, flush=True)
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
