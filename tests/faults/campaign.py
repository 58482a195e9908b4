"""Random faults in small trainings, each of which has to end as if nothing had happened.

    python tests/faults/campaign.py [N] [--seed S] [--at-once P]

Every fault has a training of its own. It is hurt, started again with --resume, and compared with
one that nothing happened to: weights bit by bit, iterations in metrics.json, files, exit codes and
messages.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from faults import FAULTS
from small_training import EVALUATION, ITERATIONS, VARIANTS, Training

from gn_det.data import make_shapes


def survives(kind: str, training: Training, reference: Path) -> str:
    """What was lost by a fault; "" if nothing."""
    if why := FAULTS[kind](training):
        return why
    shutil.rmtree(training.output / "inference", ignore_errors=True)
    if code := training.run():
        return f"started again, it ends with exit code {code}"
    if left := list(training.output.rglob("*.partial")):
        return f"{left[0]} is left"
    if "passed over" in kind:
        return ""  # other weights than without the fault
    found, expected = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (training.output, reference)
    )
    if not same(found, expected):
        return "another state at the end"
    lines = (training.output / "metrics.json").read_text().splitlines()
    seen = [json.loads(line)["iteration"] for line in lines]
    if seen != sorted(set(seen)) or not {EVALUATION - 1, ITERATIONS - 1} <= set(seen):
        return f"metrics.json has iterations {seen}"
    middle = json.loads(lines[seen.index(EVALUATION - 1)])
    return "" if "bbox/AP" in middle else "the evaluation on the way is lost"


def same(one: Any, two: Any) -> bool:
    """Whether two states are equal in every bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def campaign(kinds: Sequence[str], seed: int, at_once: int, folder: Path) -> list[str]:
    """Try a fault of each of the kinds; what each has lost, "" for nothing."""
    get_context("forkserver").set_forkserver_preload(["faults"])
    data = folder / "data"
    make_shapes(data, num_train=12, num_val=2, seed=3)

    def prepared(name: str, variant: str, rng: random.Random) -> Training:
        shutil.copytree(data, folder / name / "data")
        return Training(folder / name, variant, rng)

    references = {}
    for number, variant in enumerate(VARIANTS):
        training = prepared(f"reference{number}", variant, random.Random(0))
        assert training.run() == 0, training.told
        references[variant] = training.output

    def try_one(number: int) -> str:
        # Each kind meets every variant in turn
        variant = list(VARIANTS)[(number // len(FAULTS) + number) % len(VARIANTS)]
        training = prepared(f"fault{number}", variant, random.Random(f"{seed}/{number}"))
        lost = survives(kinds[number], training, references[variant])
        print(f"{number + 1:4} {kinds[number]} ({variant}): {lost or 'survived'}", flush=True)
        if lost:
            print(*training.told, sep="\n--- started again ---\n")
        else:
            shutil.rmtree(training.folder)
        return lost

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(try_one, range(len(kinds))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("count", nargs="?", type=int, default=200, help="faults (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    kinds = [list(FAULTS)[i % len(FAULTS)] for i in range(args.count)]
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        found = campaign(kinds, args.seed, args.at_once, Path(folder))
    print("\n| fault | tried | survived | lost |\n|---|---|---|---|")
    for kind in dict.fromkeys(kinds):
        results = [lost for k, lost in zip(kinds, found, strict=True) if k == kind]
        lost = sum(map(bool, results))
        print(f"| {kind} | {len(results)} | {len(results) - lost} | {lost} |")
    lost = sum(map(bool, found))
    print(f"{args.count} faults: {args.count - lost} survived, {lost} lost")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
