"""Describe the data and the cost of a comparison before it starts."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..data.hold_out import FRACTION
from ..engine.describe import as_section, logging_disabled
from ..engine.relative_steps import IMAGES, first_batch, why_not
from ..engine.run_record import count_parameters, peak_memory_mib
from ..errors import printable
from ..solver import build_optimizer
from .plan import Plan
from .rates import trial_lengths

# Classes that are listed by name
LISTED = 20
# Duration of the evaluation of an image, relative to training on it
EVALUATION = 0.5


@dataclass(frozen=True)
class StepCost:
    """What one training run takes.

    Args:
        seconds: per image.
        memory_mib: peak memory, of the GPU or of the process; None if it is unknown.
        checkpoint_mib: size of a checkpoint.
    """

    seconds: float
    memory_mib: float | None
    checkpoint_mib: float


def describe_plan(plan: Plan, factors: Sequence[float]) -> str:
    """Describe the datasets, and estimate time, memory and disk of all training runs.

    One training step is measured for the last norm, which has the most norm layers by default.

    Args:
        plan: of the comparison.
        factors: multiples of the learning rate that are tried with each norm.
    """
    cfg = list(plan.cells.values())[-1].cfg
    if reason := why_not(cfg):
        estimate: Iterable[str] = [f"not measured: {reason}"]
    else:
        try:
            with logging_disabled():
                estimate = _estimate(plan, factors, measure_step(cfg))
        except torch.OutOfMemoryError:
            estimate = ["the memory of the GPU is too small: see SOLVER.ACCUMULATE_ITERS"]
    sections = {
        "training set": describe_set(Path(plan.data.train)),
        "validation set": describe_set(Path(plan.data.val)),
        "model": [_model(cfg)],
        "training runs": _runs(plan, factors),
        "estimate": estimate,
    }
    return "\n".join(as_section(title, lines) for title, lines in sections.items())


def measure_step(cfg: CfgNode) -> StepCost:
    """Measure the second of two training steps from random weights.

    Args:
        cfg: a config that passes `check_config`, with a local training set.
    """
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    batch = first_batch(cfg)
    batch = batch[: min(IMAGES, max(len(batch) // cfg.SOLVER.ACCUMULATE_ITERS, 1))]
    start = 0.0
    for _ in range(2):
        _synchronize(cfg)
        start = time.perf_counter()
        with (
            EventStorage(0),
            torch.autocast(
                cfg.MODEL.DEVICE.partition(":")[0],
                getattr(torch, cfg.SOLVER.AMP.DTYPE),
                enabled=cfg.SOLVER.AMP.ENABLED,
            ),
        ):
            loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
    _synchronize(cfg)
    seconds = (time.perf_counter() - start) / len(batch)
    numbers = count_parameters(model)
    # Weights of all parameters and the momentum of those that are trained, in float32
    size = 4 * (2 * numbers["trainable"] + numbers["frozen"]) / 2**20
    return StepCost(seconds, peak_memory_mib(cfg.MODEL.DEVICE), size)


def _synchronize(cfg: CfgNode) -> None:
    if cfg.MODEL.DEVICE.startswith("cuda"):
        torch.cuda.synchronize()


def describe_set(path: Path) -> Iterator[str]:
    """Numbers of images, objects and crowds, and of the objects of each class."""
    content = json.loads(path.read_text())
    real = [a for a in content["annotations"] if not a["iscrowd"]]
    crowds = len(content["annotations"]) - len(real)
    named = {c["id"]: printable(c["name"]) for c in content["categories"]}
    crowd_text = f", {crowds:,} crowds" if crowds else ""
    classes = f"{len(named):,} class{'es' * (len(named) > 1)}"
    yield f"{len(content['images']):,} images, {len(real):,} objects of {classes}{crowd_text}"
    counts = Counter(a["category_id"] for a in real)
    listed = sorted(named, key=lambda number: -counts[number])[:LISTED]
    more = f", and {len(named) - LISTED:,} more classes" if len(named) > LISTED else ""
    yield ", ".join(f"{named[number]} {counts[number]:,}" for number in listed) + more


def _model(cfg: CfgNode) -> str:
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return cfg.MODEL.META_ARCHITECTURE
    without = "Faster R-CNN, for boxes alone: the data have no masks, or MODEL.MASK_ON is False"
    return "Mask R-CNN, for boxes and masks" if cfg.MODEL.MASK_ON else without


def _runs(plan: Plan, factors: Sequence[float]) -> Iterator[str]:
    """The number of runs, and of the trials of the learning rates."""
    counts = Counter(training.cfg.SOLVER.MAX_ITER for training in plan.cells.values())
    lengths = ", ".join(f"{runs} of {length:,} iterations" for length, runs in counts.items())
    yield f"{len(plan.cells)}: {lengths}"
    short, whole = trial_lengths(plan, factors)
    if short:
        tried = " ".join(f"{factor:g}" for factor in factors)
        length = " or ".join(f"{n:,}" for n in dict.fromkeys(short))
        yield f"before them {len(short)} trials of {length} iterations, with learning rates of"
        yield f"{tried} times the above (--rates)"
    if whole:
        yield f"and {len(whole)} trials of the whole schedule, with the best of these rates"


def _estimate(plan: Plan, factors: Sequence[float], cost: StepCost) -> Iterator[str]:
    """Time, memory and disk."""
    validation = len(json.loads(Path(plan.data.val).read_text())["images"])
    training = len(json.loads(Path(plan.data.train).read_text())["images"])
    images = 0.0
    for run in plan.cells.values():
        keys, period = run.cfg.SOLVER, run.cfg.TEST.EVAL_PERIOD
        evaluations = math.ceil(keys.MAX_ITER / period) if period > 0 else 1
        images += keys.MAX_ITER * keys.IMS_PER_BATCH + EVALUATION * evaluations * validation
    batch = next(iter(plan.cells.values())).cfg.SOLVER.IMS_PER_BATCH
    for length in chain(*trial_lengths(plan, factors)):
        images += length * batch + EVALUATION * FRACTION * training
    device = plan.cells[next(iter(plan.cells))].cfg.MODEL.DEVICE
    yield f"time: {duration(images * cost.seconds)} on {device}, without --num-gpus"
    if cost.memory_mib is not None:
        yield f"memory: {cost.memory_mib / 1024:.1f} GB for a run at {batch} images per step"
    # One final checkpoint per run, the copy of the best, and three periodic ones of one run
    disk = cost.checkpoint_mib * (len(plan.cells) + 4)
    yield f"disk: {disk / 1024:.1f} GB in {plan.output}"


def duration(seconds: float) -> str:
    """A rough duration in words, as "about 40 minutes" or "about 3 hours"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * length:
            return f"about {seconds / length:.0f} {unit}s"
    return "about a minute"
