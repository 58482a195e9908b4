"""Kill every command at random moments, and check what it leaves behind.

    python tests/faults/kills.py [N] [--seed S]

Each command is started N times and killed by SIGKILL, as when memory runs out. No process of it may
live on. Then the same command must end well, with its product and without incomplete files.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.models import resnet18

ROOT = Path(__file__).parents[2]
# Seconds in which all processes of a killed command must end
GRACE = 5.0
MODEL = (
    *["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", "0"],
    *["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MASK_FORMAT", "bitmask"],
    *["MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"],
)
DETECTOR = "Shapes/mask_rcnn_R_18_FPN_gn.yaml"


@dataclass(frozen=True)
class Command:
    """A command, and a file that exists once it has ended well."""

    words: tuple[str, ...]
    product: Path


def commands(folder: Path) -> dict[str, Command]:
    """All commands, in an order in which each finds what it needs."""
    data, out = folder / "datasets/shapes", folder / "output"
    sets = [w for s in ("train", "val") for w in (f"--{s}", f"{data}/instances_{s}.json", IMAGES)]
    sets = [word.replace(IMAGES, f"{data}/images") for word in sets]
    backbone, converted = folder / "resnet18.pth", folder / "converted.pth"
    torch.save(resnet18().state_dict(), backbone)
    short = ("SOLVER.MAX_ITER", "12", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "3")
    train = ("train", "--config-file", DETECTOR, "--resume", *MODEL, *short)
    compare = ("compare", *sets, "--base", DETECTOR, "--init", "--budget", "8")
    model = out / "train"
    table = {
        "make_shapes": (
            ("tools/make_shapes.py", str(data), "--num-train", "40", "--num-val", "6"),
            data / "instances_val.json",
        ),
        "convert": (
            (
                *("convert", str(backbone), str(converted), "--norm", "GN"),
                *("--calibrate", f"{data}/images", "--num-images", "16", "--distill", "8"),
            ),
            converted,
        ),
        "pretrain": (
            (
                *("pretrain", "--config-file", "Shapes/pretrain_R_18_gn.yaml"),
                *("--resume", "MODEL.DEVICE", "cpu", "PRETRAIN.EPOCHS", "2", "PRETRAIN.STEPS"),
                *("()", "SOLVER.CHECKPOINT_PERIOD", "3", "OUTPUT_DIR", str(out / "pretrain")),
            ),
            out / "pretrain/backbone.pth",
        ),
        "train": (
            (*train, "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(model)),
            model / "run.json",
        ),
        "predict": (
            (
                *("predict", "--model", str(model), f"{data}/images"),
                *("--output-dir", str(out / "predict")),
            ),
            out / "predict/coco_instances_results.json",
        ),
        "compare": (
            (
                *(*compare[:-2], "", *compare[-2:], "--norms", "LN", "GN", "--seeds", "0"),
                *("--output-dir", str(out / "compare"), *MODEL),
            ),
            out / "compare/report.html",
        ),
    }
    return {name: Command(words, product) for name, (words, product) in table.items()}


IMAGES = "IMAGES"


def start(command: Command, folder: Path) -> subprocess.Popen:
    """Start a command in a session of its own."""
    first, *rest = command.words
    program = [first] if first.endswith(".py") else ["-m", "gn_det", first]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(folder / "datasets")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *program, *rest],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def processes_of(session: int) -> Iterator[int]:
    """Processes of a session that have not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text().rpartition(") ")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(owner) == session and state != "Z":
            yield int(path.parent.name)


def survives(command: Command, folder: Path, moments: Sequence[float]) -> str:
    """Kill a command at some moments, then let it end; describe any damage, "" for none.

    Args:
        command: the command.
        folder: of its inputs and outputs.
        moments: seconds after its start.
    """
    for moment in moments:
        process = start(command, folder)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        deadline = time.monotonic() + GRACE
        while (left := list(processes_of(process.pid))) and time.monotonic() < deadline:
            time.sleep(0.1)
        for number in left:
            os.kill(number, signal.SIGKILL)
        if left:
            return f"{len(left)} processes lived on after {moment:.1f} s"
        if process.stdout is not None:
            process.stdout.close()
        if command.product.exists() and command.words[0].endswith("make_shapes.py"):
            break  # it refuses a folder that exists
    if not (command.product.exists() and command.words[0].endswith("make_shapes.py")):
        process = start(command, folder)
        output = process.communicate()[0]
        if process.returncode:
            return f"it ends with exit code {process.returncode}: {output[-800:]}"
    if not command.product.exists():
        return f"{command.product} is missing"
    left_files = [*folder.rglob("*.partial")]
    return f"{left_files[0]} was not deleted" if left_files else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    help_ = "kills of each command (default: %(default)s)"
    add("count", nargs="?", type=int, default=10, metavar="N", help=help_)
    add("--seed", type=int, default=0, metavar="S", help="random seed (default: %(default)s)")
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="kills_") as name:
        folder = Path(name)
        for title, command in commands(folder).items():
            moments = [rng.uniform(0.5, 25) for _ in range(args.count)]
            damage = survives(command, folder, moments)
            failed += bool(damage)
            print(f"{title:12} {damage or 'survived'}", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
