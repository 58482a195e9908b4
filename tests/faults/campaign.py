"""Inject random faults into small training runs and check that resuming them is exact.

    python tests/faults/campaign.py [N] [--seed S] [--at-once P]

Each fault is injected into a run of its own. The run is resumed with --resume and compared with an
undisturbed run: weights bit by bit, iterations in metrics.json, files, exit codes and messages.
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
    """Inject a fault, resume the run, and describe any damage; "" if there is none."""
    if damage := FAULTS[kind](training):
        return damage
    shutil.rmtree(training.output / "inference", ignore_errors=True)
    if code := training.run():
        return f"the resumed run ends with exit code {code}"
    if partial := list(training.output.rglob("*.partial")):
        return f"{partial[0]} was not deleted"
    if "skipped" in kind:
        return ""  # the weights differ from those of the undisturbed run
    state, expected = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (training.output, reference)
    )
    if not same(state, expected):
        return "the final state differs"
    lines = (training.output / "metrics.json").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    required = {EVALUATION - 1, ITERATIONS - 1}
    if iterations != sorted(set(iterations)) or not required <= set(iterations):
        return f"metrics.json has iterations {iterations}"
    middle = json.loads(lines[iterations.index(EVALUATION - 1)])
    return "" if "bbox/AP" in middle else "the evaluation during training is lost"


def same(one: Any, two: Any) -> bool:
    """Whether two states are bitwise equal."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def campaign(kinds: Sequence[str], seed: int, at_once: int, folder: Path) -> list[str]:
    """Inject a fault of each kind in a list.

    Args:
        kinds: keys of `FAULTS`; may repeat.
        seed: of the random numbers.
        at_once: number of runs in parallel.
        folder: for the outputs.

    Returns:
        a description of the damage for each fault; "" if there is none.
    """
    get_context("forkserver").set_forkserver_preload(["faults"])
    data = folder / "data"
    make_shapes(data, num_train=12, num_val=2, seed=3)

    def prepared(name: str, variant: str, rng: random.Random) -> Training:
        shutil.copytree(data, folder / name / "data")
        return Training(folder / name, variant, rng)

    references = {}
    for number, variant in enumerate(VARIANTS):
        training = prepared(f"reference{number}", variant, random.Random(0))
        assert training.run() == 0, training.outputs
        references[variant] = training.output

    def try_one(number: int) -> str:
        # Each kind is tried with every variant in turn
        variant = list(VARIANTS)[(number // len(FAULTS) + number) % len(VARIANTS)]
        training = prepared(f"fault{number}", variant, random.Random(f"{seed}/{number}"))
        damage = survives(kinds[number], training, references[variant])
        print(f"{number + 1:4} {kinds[number]} ({variant}): {damage or 'survived'}", flush=True)
        if damage:
            print(*training.outputs, sep="\n--- resumed ---\n")
        else:
            shutil.rmtree(training.folder)
        return damage

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(try_one, range(len(kinds))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="example: python tests/faults/campaign.py 20 --at-once 2",
    )
    add = parser.add_argument
    help_ = "number of faults (default: %(default)s)"
    add("count", nargs="?", type=int, default=200, metavar="N", help=help_)
    add("--seed", type=int, default=0, metavar="S", help="random seed (default: %(default)s)")
    help_ = "number of runs in parallel (default: one per CPU core, %(default)s)"
    add("--at-once", type=int, default=os.cpu_count() or 1, metavar="P", help=help_)
    args = parser.parse_args()
    kinds = [list(FAULTS)[i % len(FAULTS)] for i in range(args.count)]
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        results = campaign(kinds, args.seed, args.at_once, Path(folder))
    print("\n| fault | tried | survived | failed |\n|---|---|---|---|")
    for kind in dict.fromkeys(kinds):
        failures = [bool(damage) for k, damage in zip(kinds, results, strict=True) if k == kind]
        failed = sum(failures)
        print(f"| {kind} | {len(failures)} | {len(failures) - failed} | {failed} |")
    failed = sum(map(bool, results))
    print(f"{args.count} faults: {args.count - failed} survived, {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
