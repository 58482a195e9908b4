"""A linear probe: how much of a picture's content can be read off a backbone's features."""

import torch
from torch import Tensor

# Of the weights' squared norm, on features of variance 1
RIDGE = 100.0


def mean_auc(features: Tensor, labels: Tensor, seed: int, num_classes: int = 12) -> float:
    """Mean area under the ROC curve of "does the picture contain the class", by ridge regression.

    Half of the pictures, drawn by the seed, are fitted to, and the others tested on.

    Args:
        features: (N, F).
        labels: (N, C), 1 where the picture contains the class; the most frequent are probed.
        num_classes: how many classes are probed.
    """
    features, labels = features.double(), labels.double()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    fit, test = order.chunk(2)
    std, mean = torch.std_mean(features[fit], dim=0)
    x = (features - mean) / std.clamp(min=1e-6)
    frequent = labels.sum(0).argsort(descending=True, stable=True)[:num_classes]
    y = labels[:, frequent]
    # The dual, for there are more features than pictures
    kernel = x[fit] @ x[fit].T + RIDGE * torch.eye(len(fit), dtype=x.dtype)
    scores = x[test] @ x[fit].T @ torch.linalg.solve(kernel, y[fit] - y[fit].mean(0))
    aucs = [auc(scores[:, c], y[test, c]) for c in range(len(frequent))]
    return sum(aucs) / len(aucs)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Share of (positive, negative) pairs whose scores are in order; ties count half."""
    pairs = scores[positive > 0][:, None] - scores[positive == 0][None]
    return ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()
