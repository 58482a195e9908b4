"""Label-free distillation: a network learns to give the features that another one gives."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

BATCH_SIZE = 4
# Of each tensor's root mean square: filters of a stem that sees pixels up to 255 are a hundred
# times smaller than others, and a step as large as theirs would undo them
LEARNING_RATE = 1e-3


def distill(network: nn.Module, reference: nn.Module, pictures: Tensor, steps: int) -> None:
    """Train all of `network`, in place, until its features are `reference`'s as near as may be.

    Adam with a one-cycle learning rate, in proportion to each tensor's size (zeros stay), on
    batches of pictures that are flipped at random. The loss is the squared difference of each
    stage's output, as a share of that output's variance.

    Args:
        network: a ResNet, from `calibrate`.
        reference: a ResNet with the same output features, in evaluation mode.
        pictures: (N, 3, H, W), normalised as both take them.
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
    for step in range(steps):
        batch = pictures[torch.randint(len(pictures), (BATCH_SIZE,), device=pictures.device)]
        for axis in (-1, -2):
            batch = batch.flip(axis) if torch.rand(()) < 0.5 else batch
        with torch.no_grad():
            wanted = reference(batch)
        losses = feature_errors(network(batch), wanted)
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            told = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            logging.getLogger(__name__).info(f"distillation {step + 1:4}/{steps}: {told}")
    for parameter in frozen:
        parameter.requires_grad_(False)


def feature_errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean squared difference of each feature map, as a share of the wanted one's variance."""
    return {
        name: (found[name] - features).square().mean() / features.var()
        for name, features in wanted.items()
    }
