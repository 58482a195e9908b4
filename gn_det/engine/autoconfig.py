"""Adapt a recipe to a dataset: input size, anchors, schedule and learning rate."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..check.norm_keys import STOCK
from ..checkpoint.recipe import HEADS_GROUPING
from ..config import as_opts, default_config
from ..config_file import override_config
from ..data.object_sizes import ObjectSizes
from ..errors import InputError
from ..modeling.norm import parts_with_norm
from ..solver import fitted_mask_head_factor

# Target for the median object size, in pixels of the network's input
GOOD_SIZE = 32
SIZE_KEYS = {f"INPUT.{end}_SIZE_{split}" for end in ("MIN", "MAX") for split in ("TRAIN", "TEST")}
# Evaluations and checkpoints per training run; they make the learning curve
NUM_EVALUATIONS = 8
# Detectron's 1x schedule on COCO, and the dataset size below which more epochs are proposed
EPOCHS_1X, IMAGES_1X = 12, 2800


@dataclass(frozen=True)
class Proposal:
    """A config key, its proposed value, and the reason."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key} {self.value}: {self.reason}"


def propose_sizes(
    cfg: CfgNode, sizes: ObjectSizes, given: Sequence[str] = ()
) -> Iterator[Proposal]:
    """Propose the input size and the anchor sizes.

    Small images are enlarged, at most by 2, until the median object has `GOOD_SIZE` pixels. The
    anchors are halved until the smallest one matches the 5th percentile of the object sizes.

    Args:
        cfg: the base config, merged with `given`.
        sizes: image and object sizes of the training set.
        given: the user's `KEY VALUE` pairs; an input size among them is kept.
    """
    short = float(np.median(sizes.images.min(1)))
    size = float(np.median(np.sqrt(sizes.objects.prod(1))))
    old, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    side = old
    enlarged = short * min(max(GOOD_SIZE / size, 1), 2)
    if enlarged < old and not SIZE_KEYS & {*given[::2]}:
        side = max(32 * round(enlarged / 32), 32)
        reason = f"median shorter side of images {short:.0f} pixels, median object {size:.0f}"
        ratio = side / old
        longest = round(longest * ratio)
        yield Proposal("INPUT.MIN_SIZE_TEST", side, reason)
        yield Proposal("INPUT.MAX_SIZE_TEST", longest, "scaled by the same factor")
        jitter = tuple(max(round(s * ratio), 1) for s in cfg.INPUT.MIN_SIZE_TRAIN)
        yield Proposal("INPUT.MIN_SIZE_TRAIN", jitter, "scaled by the same factor")
        longest_train = round(cfg.INPUT.MAX_SIZE_TRAIN * ratio)
        yield Proposal("INPUT.MAX_SIZE_TRAIN", longest_train, "scaled by the same factor")
    small = float(np.percentile(np.sqrt(sizes.resized(side, longest).prod(1)), 5))
    least = min(min(level) for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    factor = 2.0 ** math.floor(math.log2(max(small, 1) * math.sqrt(2) / least))
    factor = max(min(factor, 1), 8 / least)
    if factor < 1:
        anchors = [[int(s * factor) for s in level] for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
        reason = f"5% of the objects are smaller than {small:.0f} pixels in the resized images"
        yield Proposal("MODEL.ANCHOR_GENERATOR.SIZES", anchors, reason)


def propose_heads_grouping(cfg: CfgNode, given: Sequence[str] = ()) -> Iterator[Proposal]:
    """Propose the grouping of GN in FPN and heads, the same for all norms.

    Args:
        cfg: the base config; a grouping that it sets is kept.
        given: the user's `KEY VALUE` pairs; a grouping among them is kept.
    """
    keys, default = cfg.MODEL.GROUP_NORM, default_config().MODEL.GROUP_NORM
    names = ("NUM_GROUPS", "DIM_PER_GP", "HEADS_NUM_GROUPS", "HEADS_DIM_PER_GP")
    if any(keys[name] != default[name] or f"MODEL.GROUP_NORM.{name}" in given for name in names):
        return
    parts = (cfg.MODEL.BACKBONE, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD)
    if any(part.NAME in STOCK for part in parts):
        return  # Detectron2's own always have 32 groups
    if {*parts_with_norm(cfg)} - {"backbone"}:
        for key, width in HEADS_GROUPING.items():
            yield Proposal(key, width, "learns faster than 32 groups in short schedules")


def propose_mask_head(cfg: CfgNode) -> Iterator[Proposal]:
    """Propose the factor on the mask head's rate, the same for all norms.

    Args:
        cfg: the config with its schedule; a factor that it sets is kept.
    """
    if "mask head" not in parts_with_norm(cfg) or cfg.SOLVER.MASK_HEAD_MULTIPLIER:
        return
    factor = fitted_mask_head_factor(cfg)
    channels = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM
    reason = f"{channels} channels and {cfg.SOLVER.MAX_ITER} iterations at {cfg.SOLVER.BASE_LR:g}"
    yield Proposal("SOLVER.MASK_HEAD_MULTIPLIER", factor, f"{reason}, for a mask head from scratch")


def images_seen(budget: str | None, num_images: int, largest_batch: int) -> tuple[int, str]:
    """Number of images that each training run processes, and the reason.

    Args:
        budget: epochs as "24epochs", iterations of the largest batch as "5000", or None for a
            proposal.
        num_images: images with objects in the training set.
        largest_batch: the largest number of images per batch in the comparison.

    Raises:
        InputError: if `budget` has another form.
    """
    if budget is None:
        # A square root: small datasets need more epochs, but not as many images as COCO
        epochs = max(EPOCHS_1X, round(EPOCHS_1X * math.sqrt(IMAGES_1X / num_images)))
        return epochs * num_images, f"{epochs} epochs of {num_images:,} images with objects"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(e|ep|epochs?)?", budget)
    if not match or float(match[1]) <= 0:
        raise InputError(f"--budget {budget}: give iterations, as 5000, or epochs, as 24epochs")
    if match[2]:
        return math.ceil(float(match[1]) * num_images), f"{match[1]} epochs from --budget"
    seen = math.ceil(float(match[1])) * largest_batch
    return seen, f"--budget of {match[1]} iterations at {largest_batch} images per batch"


def propose_schedule(cfg: CfgNode, seen: int, batch: int, reason: str) -> Iterator[Proposal]:
    """Propose schedule and learning rate for one batch size by scaling those of the recipe.

    Args:
        cfg: the base config.
        seen: images that the training run processes in total.
        batch: images per batch.
        reason: for `seen`, as `images_seen` returns it.
    """
    keys = cfg.SOLVER
    end = math.ceil(seen / batch)
    yield Proposal("SOLVER.IMS_PER_BATCH", batch, "images per training step")
    yield Proposal("SOLVER.REFERENCE_WORLD_SIZE", 0, "no scaling of the batch by number of GPUs")
    yield Proposal("SOLVER.MAX_ITER", end, f"{reason}, {batch} images per batch")
    scaled = {round(step / keys.MAX_ITER * end) for step in keys.STEPS}
    # In short schedules steps may coincide, or round to the first or last iteration
    steps = tuple(sorted(step for step in scaled if 0 < step < end))
    yield Proposal("SOLVER.STEPS", steps, "scaled with MAX_ITER")
    warmup = min(keys.WARMUP_ITERS, end // 10)
    yield Proposal("SOLVER.WARMUP_ITERS", warmup, "at most a tenth of MAX_ITER")
    rate = float(f"{keys.BASE_LR * batch / keys.IMS_PER_BATCH:.4g}")
    linear = f"linear scaling rule from {keys.BASE_LR} at {keys.IMS_PER_BATCH} images per batch"
    yield Proposal("SOLVER.BASE_LR", rate, linear)
    period = math.ceil(end / NUM_EVALUATIONS)
    yield Proposal("TEST.EVAL_PERIOD", period, f"{NUM_EVALUATIONS} evaluations")
    yield Proposal("SOLVER.CHECKPOINT_PERIOD", period, "one checkpoint per evaluation")
    yield Proposal("SOLVER.KEEP_CHECKPOINTS", 2, "the newest, and one more if it is damaged")


def fit_recipes(
    base: CfgNode,
    sizes: ObjectSizes,
    batches: Sequence[int],
    budget: str | None,
    opts: Sequence[str],
) -> dict[int, list[Proposal]]:
    """The recipe's changes for the dataset, for each batch size.

    Args:
        base: the base config, merged with `opts`.
        sizes: image and object sizes of the training set.
        batches: images per batch.
        budget: as in `images_seen`.
        opts: the user's `KEY VALUE` pairs, which are not changed.
    """
    seen, reason = images_seen(budget, len(sizes.images), max(batches))
    shared = [*propose_sizes(base, sizes, opts), *propose_heads_grouping(base, opts)]
    recipes = {}
    for batch in batches:
        schedule = propose_schedule(base, seen, batch, reason)
        recipe = drop_overridden([*shared, *schedule], opts)
        cfg = override_config(base, as_opts({p.key: p.value for p in recipe}), "of the recipe")
        recipes[batch] = [*recipe, *propose_mask_head(cfg)]
    return recipes


def drop_overridden(proposals: Sequence[Proposal], given: Sequence[str]) -> list[Proposal]:
    """The proposals whose keys the user has not set.

    The input sizes belong together: if the user sets one of them, all their proposals are dropped.

    Args:
        proposals: of `propose_sizes` and `propose_schedule`.
        given: the user's `KEY VALUE` pairs.
    """
    keys = {*given[::2]}
    if keys & SIZE_KEYS:
        keys |= SIZE_KEYS
    return [proposal for proposal in proposals if proposal.key not in keys]
