"""A recipe made to fit a data set: input size, anchors, schedule and learning rate."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..data.object_sizes import ObjectSizes
from ..errors import InputError

# Half of the objects should be at least so large, in pixels of the network's input
GOOD_SIZE = 32
SIZE_KEYS = {f"INPUT.{end}_SIZE_{split}" for end in ("MIN", "MAX") for split in ("TRAIN", "TEST")}
# A training has so many evaluations and checkpoints, which make its learning curve
NUM_EVALUATIONS = 8
# Detectron's 1x on COCO, and the size of a data set that gets more passes than that
EPOCHS_1X, IMAGES_1X = 12, 2800


@dataclass(frozen=True)
class Proposal:
    """A config key, its value, and why."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key} {self.value}: {self.why}"


def propose_sizes(
    cfg: CfgNode, sizes: ObjectSizes, given: Sequence[str] = ()
) -> Iterator[Proposal]:
    """Input size and anchors.

    Args:
        given: the user's `KEY VALUE` pairs, which `cfg` has; a size among them is kept.
    """
    short = float(np.median(sizes.pictures.min(1)))
    size = float(np.median(np.sqrt(sizes.objects.prod(1))))
    old, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    side = old
    enlarged = short * min(max(GOOD_SIZE / size, 1), 2)
    if enlarged < old and not SIZE_KEYS & {*given[::2]}:
        side = max(32 * round(enlarged / 32), 32)
        why = f"pictures are {short:.0f} pixels on their shorter side, objects {size:.0f}"
        ratio = side / old
        longest = round(longest * ratio)
        yield Proposal("INPUT.MIN_SIZE_TEST", side, why)
        yield Proposal("INPUT.MAX_SIZE_TEST", longest, "in proportion")
        jitter = tuple(max(round(s * ratio), 1) for s in cfg.INPUT.MIN_SIZE_TRAIN)
        yield Proposal("INPUT.MIN_SIZE_TRAIN", jitter, "in proportion")
        longest_train = round(cfg.INPUT.MAX_SIZE_TRAIN * ratio)
        yield Proposal("INPUT.MAX_SIZE_TRAIN", longest_train, "in proportion")
    small = float(np.percentile(np.sqrt(sizes.resized(side, longest).prod(1)), 5))
    least = min(min(level) for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    factor = 2.0 ** math.floor(math.log2(max(small, 1) * math.sqrt(2) / least))
    factor = max(min(factor, 1), 8 / least)
    if factor < 1:
        anchors = [[int(s * factor) for s in level] for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
        why = f"1 object of 20 is smaller than {small:.0f} pixels once its picture is resized"
        yield Proposal("MODEL.ANCHOR_GENERATOR.SIZES", anchors, why)


def images_seen(budget: str | None, pictures: int, largest_batch: int) -> tuple[int, str]:
    """How many pictures each training sees, and why.

    Args:
        budget: "24epochs", or iterations of the largest batch as "5000"; None for a proposal.
        pictures: in the training set, with objects.

    Raises:
        InputError: for another kind of budget.
    """
    if budget is None:
        # Small sets need more passes, though not as many as would make them equal
        epochs = max(EPOCHS_1X, round(EPOCHS_1X * math.sqrt(IMAGES_1X / pictures)))
        return epochs * pictures, f"{epochs} epochs of {pictures:,} pictures with objects"
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(e|ep|epochs?)?", budget)
    if not found or float(found[1]) <= 0:
        raise InputError(f"--budget {budget}: give iterations, as 5000, or epochs, as 24epochs")
    if found[2]:
        return math.ceil(float(found[1]) * pictures), f"{found[1]} epochs, as --budget says"
    seen = math.ceil(float(found[1])) * largest_batch
    return seen, f"as many as in {found[1]} iterations of {largest_batch}, as --budget says"


def propose_schedule(cfg: CfgNode, seen: int, batch: int, why: str) -> Iterator[Proposal]:
    """Schedule and learning rate of one batch size, the recipe's own in proportion.

    Args:
        seen: pictures that the training sees in all.
        batch: pictures a step.
    """
    keys = cfg.SOLVER
    end = math.ceil(seen / batch)
    yield Proposal("SOLVER.IMS_PER_BATCH", batch, "as --images-per-batch says")
    yield Proposal("SOLVER.REFERENCE_WORLD_SIZE", 0, "the batch is meant as it is")
    yield Proposal("SOLVER.MAX_ITER", end, f"{why}, at {batch} a batch")
    scaled = {round(step / keys.MAX_ITER * end) for step in keys.STEPS}
    # Short schedules round to steps that coincide, or lie at an end
    steps = tuple(sorted(step for step in scaled if 0 < step < end))
    yield Proposal("SOLVER.STEPS", steps, "in proportion")
    warmup = min(keys.WARMUP_ITERS, end // 10)
    yield Proposal("SOLVER.WARMUP_ITERS", warmup, "a tenth of the schedule at most")
    rate = float(f"{keys.BASE_LR * batch / keys.IMS_PER_BATCH:.4g}")
    yield Proposal(
        "SOLVER.BASE_LR", rate, f"linear in the batch, {keys.BASE_LR} at {keys.IMS_PER_BATCH}"
    )
    period = math.ceil(end / NUM_EVALUATIONS)
    yield Proposal("TEST.EVAL_PERIOD", period, f"{NUM_EVALUATIONS} evaluations")
    yield Proposal("SOLVER.CHECKPOINT_PERIOD", period, "a checkpoint with each")


def chosen(proposals: Sequence[Proposal], given: Sequence[str]) -> list[Proposal]:
    """The proposals for keys that the user has not given a value.

    The sizes of pictures go together: who gives one of them gives them all.

    Args:
        given: `KEY VALUE` pairs.
    """
    keys = {*given[::2]}
    if keys & SIZE_KEYS:
        keys |= SIZE_KEYS
    return [proposal for proposal in proposals if proposal.key not in keys]
