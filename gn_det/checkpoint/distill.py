"""Label-free distillation: a network learns to reproduce the features of another network."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

BATCH_SIZE = 4
# Relative to each tensor's root mean square. A stem for pixels up to 255 has filters a hundred
# times smaller than the other layers, and a common rate would destroy them
LEARNING_RATE = 1e-3


def distill(network: nn.Module, reference: nn.Module, images: Tensor, steps: int) -> None:
    """Train all parameters of `network`, in place, to reproduce the features of `reference`.

    The optimizer is Adam with a one-cycle schedule. The peak rate of a tensor is proportional to
    its root mean square, so a tensor of zeros stays zero. Batches of `BATCH_SIZE` images are
    flipped at random. The loss is the sum of `feature_errors` over the stages.

    Args:
        network: a calibrated ResNet.
        reference: a ResNet with the same output features, in evaluation mode.
        images: (N, 3, H, W), normalised.
        steps: number of optimizer steps.
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
        batch = images[torch.randint(len(images), (BATCH_SIZE,), device=images.device)]
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
    for parameter in frozen:
        parameter.requires_grad_(False)


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
