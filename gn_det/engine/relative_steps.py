"""How far the first steps of a training run would move each part of the model."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim import Optimizer

from ..checkpoint.checkpointer import StrictCheckpointer
from ..data.loader import build_train_loader
from ..modeling.parts import MASK_HEAD_PARTS, part_of
from ..solver import build_optimizer, is_norm
from .describe import as_section, logging_disabled

# Mask heads with GN that moved by 6e-4 learned nothing, by 2e-3 little, and by 7e-3 well
LEAST = 1e-3
# Images of the batch that are used: a CPU has no memory for a large batch
IMAGES = 2
# Iterations at which the schedule's rate is sampled
SAMPLES = 200


@dataclass(frozen=True)
class RelativeStep:
    """The first step of one part of the model.

    Args:
        step: rate times norm of the gradient over norm of the filters, at the full learning rate.
        moved: `step` times the sum over all iterations of the rates, relative to the full one, over
            1 minus the momentum: how far the part would move if its gradient stayed the same.
    """

    step: float
    moved: float


def relative_steps(cfg: CfgNode) -> dict[str, RelativeStep]:
    """Compute the gradient of one training batch, and relate it to the weights.

    Only the weights of convolutions and linear layers count, without biases and norms. Gradients
    are clipped as in training. Nothing is trained or written.

    Args:
        cfg: a config that passes `check_config`, with a local training set.

    Returns:
        {part, as `part_of` names it: its step}; parts without a gradient are left out.
    """
    seed_all_rng(max(cfg.SEED, 0))
    model = _build(cfg)
    optimizer = build_optimizer(cfg, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    batch = first_batch(cfg)[:IMAGES]
    with EventStorage(0):
        sum(model(batch).values()).backward()
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not is_norm(module)
    }
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, weight in weights.items():
        if weight.grad is not None and id(weight) in rates:
            scale = rates[id(weight)] * _clipping(cfg, weight.grad)
            sums = totals[part_of(f"{name}.")]
            sums[0] += (scale * weight.grad.double().norm().item()) ** 2
            sums[1] += weight.detach().double().norm().item() ** 2
    length = _relative_length(cfg) / (1 - cfg.SOLVER.MOMENTUM)
    steps = {part: (a / b) ** 0.5 for part, (a, b) in totals.items() if b > 0}
    return {part: RelativeStep(step, step * length) for part, step in steps.items()}


def first_batch(cfg: CfgNode) -> list[dict]:
    """The first batch of images, read without loader processes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    return next(iter(build_train_loader(cfg)))


def _build(cfg: CfgNode) -> nn.Module:
    """The model with its initial weights, if these are in a local file."""
    model = build_model(cfg).train()
    if cfg.MODEL.WEIGHTS and Path(cfg.MODEL.WEIGHTS).is_file():
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    return model


def _clipping(cfg: CfgNode, gradient: torch.Tensor) -> float:
    """The factor of `SOLVER.CLIP_GRADIENTS` on the gradient of one tensor."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "norm":
        return 1.0
    return min(clip.CLIP_VALUE / max(gradient.norm(clip.NORM_TYPE).item(), 1e-12), 1.0)


def _relative_length(cfg: CfgNode) -> float:
    """Sum over all iterations of the learning rate, relative to the full one."""
    optimizer: Optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    end, rates = cfg.SOLVER.MAX_ITER, []
    for step in torch.linspace(0, end - 1, min(SAMPLES, end)).round().int().tolist():
        scheduler.last_epoch = step
        rates.append(scheduler.get_lr()[0])
    return sum(rates) / len(rates) * end


def describe_steps(cfg: CfgNode) -> str:
    """Describe the relative step of each part, and warn of a mask head that would not learn.

    Args:
        cfg: as in `relative_steps`.

    Returns:
        lines of text, in the form of `describe_recipe`; "" for other architectures than R-CNNs.
    """
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return ""
    if reason := why_not(cfg):
        return as_section("relative step", [f"not measured: {reason}"])
    with logging_disabled():
        steps = relative_steps(cfg)
    end = f"{cfg.SOLVER.MAX_ITER:,} iterations if the gradient stayed the same"
    lines = [f"at the start, in one batch, and summed over {end}"]
    lines += [f"{part:16} {s.step:8.1e}   {s.moved:8.1e}" for part, s in steps.items()]
    head = MASK_HEAD_PARTS[0]
    if cfg.MODEL.ROI_MASK_HEAD.NORM and head in steps and steps[head].moved < LEAST:
        lines.append(
            f"WARNING: the {head} will learn little or nothing: raise "
            "SOLVER.MASK_HEAD_MULTIPLIER (0 chooses it), or train for longer"
        )
    return as_section("relative step", lines)


def why_not(cfg: CfgNode) -> str:
    """The reason why a training step cannot be measured on this machine, or ""."""
    if comm.get_world_size() > 1:
        return "several processes were started"
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    for name in cfg.DATASETS.TRAIN:
        path = MetadataCatalog.get(name).get("json_file")
        if name not in DatasetCatalog.list() or (path is not None and not Path(path).is_file()):
            return f"{name} is not found"
    return ""
