"""Label-free distillation: a network learns to reproduce the features of another network."""

import logging
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import write_whole
from ..progress import progress
from .read import read_content
from .save import save_content

BATCH_SIZE = 4
# Relative to each tensor's root mean square. A stem for pixels up to 255 has filters a hundred
# times smaller than the other layers, and a common rate would destroy them
LEARNING_RATE = 1e-3
# Steps between two states that an interrupted distillation resumes from
SAVE_PERIOD = 25


def distill(
    network: nn.Module,
    reference: nn.Module,
    images: Tensor,
    steps: int,
    state: Path | None = None,
) -> None:
    """Train all parameters of `network`, in place, to reproduce the features of `reference`.

    The optimizer is Adam with a one-cycle schedule. The peak rate of a tensor is proportional to
    its root mean square, so a tensor of zeros stays zero. Batches of `BATCH_SIZE` images are
    flipped at random. The loss is the sum of `feature_errors` over the stages.

    Args:
        network: a calibrated ResNet.
        reference: a ResNet with the same output features, in evaluation mode.
        images: (N, 3, H, W), normalised.
        steps: number of optimizer steps.
        state: file that an interrupted distillation resumes from. It is used only if networks,
            images and steps are the same, and removed at the end.
    """
    frozen = [p for p in network.parameters() if not p.requires_grad]
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    rates = [LEARNING_RATE * p.detach().square().mean().sqrt().item() for p in parameters]
    optimizer = torch.optim.Adam([{"params": p} for p in parameters])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=max(steps, 2), pct_start=0.1
    )
    key = _key(network, reference, images, steps) if state else ""
    first = _restore(state, key, network, optimizer) if state else 0
    schedule.last_epoch = first
    for step in progress(range(first, steps), "distillation", steps, first):
        batch = images[torch.randint(len(images), (BATCH_SIZE,)).to(images.device)]
        for axis in (-1, -2):
            batch = batch.flip(axis) if torch.rand(()) < 0.5 else batch
        with torch.no_grad():
            target = reference(batch)
        losses = feature_errors(network(batch), target)
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            text = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            logging.getLogger(__name__).info(f"distillation step {step + 1:4}/{steps}: {text}")
        if state and (step + 1) % SAVE_PERIOD == 0:
            _save(state, key, step + 1, network, optimizer)
    if state:
        state.unlink(missing_ok=True)
    for parameter in frozen:
        parameter.requires_grad_(False)


def _key(network: nn.Module, reference: nn.Module, images: Tensor, steps: int) -> str:
    """A hash of everything that decides the result."""
    digest = sha256(f"{steps}".encode())
    for tensor in (*network.state_dict().values(), *reference.state_dict().values(), images):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(
    path: Path, key: str, step: int, network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    content: dict[str, Any] = {"key": key, "step": step, "random": torch.get_rng_state()}
    content |= {"network": dict(network.state_dict()), "optimizer": optimizer.state_dict()}
    with write_whole(path, "wb") as file:
        save_content(content, file)


def _restore(path: Path, key: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore a state that `_save` wrote, and return its number of steps; 0 if none fits."""
    try:
        content = read_content(path) if path.is_file() else {}
    except InputError:
        return 0  # cut off by a full disk, for example
    if not isinstance(content, Mapping) or content.get("key") != key:
        return 0
    network.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["random"])
    logging.getLogger(__name__).info(f"distillation resumes after step {content['step']}")
    return content["step"]


def feature_errors(
    features: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean squared error of each feature map, divided by the variance of its target.

    Args:
        features, targets: stage -> feature map of shape (N, C, H, W), the same stages in both.

    Returns:
        stage -> error, a scalar tensor.
    """
    return {
        name: (features[name] - target).square().mean() / target.var()
        for name, target in targets.items()
    }
