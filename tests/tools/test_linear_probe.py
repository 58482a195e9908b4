"""The linear probe, compared with the area under the ROC curve and primal ridge regression."""

import numpy as np
import pytest
import torch
from studies.linear_probe import RIDGE, auc, mean_auc


def curve_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve, by thresholds and the trapezoidal rule."""
    thresholds = [np.inf, *sorted(set(scores), reverse=True)]
    hits = np.array([(scores[positive] >= t).mean() for t in thresholds])
    alarms = np.array([(scores[~positive] >= t).mean() for t in thresholds])
    return float(((hits[1:] + hits[:-1]) / 2 * np.diff(alarms)).sum())


def test_auc_with_ties():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 80).astype(float), rng.random(80) < 0.3
    area = auc(torch.from_numpy(scores), torch.from_numpy(positive))
    assert area == pytest.approx(curve_auc(scores, positive))


def test_mean_auc_equals_primal_ridge_regression():
    rng = np.random.default_rng(1)
    x = rng.normal(3.0, 2.0, (120, 10))
    labels = np.stack([x @ rng.normal(size=10) + rng.normal(size=120) > c for c in (-5, 0, 9)], 1)
    result = mean_auc(torch.from_numpy(x), torch.from_numpy(labels), seed=5, num_classes=2)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(5)).numpy()
    fit, test = order[:60], order[60:]
    z = (x - x[fit].mean(0)) / x[fit].std(0, ddof=1)
    # The two most frequent classes
    y = labels[:, labels.sum(0).argsort()[::-1][:2]].astype(float)
    gram = z[fit].T @ z[fit] + RIDGE * np.eye(10)
    weights = np.linalg.solve(gram, z[fit].T @ (y[fit] - y[fit].mean(0)))
    scores = z[test] @ weights
    expected = [curve_auc(scores[:, c], y[test, c] > 0) for c in range(2)]
    assert result == pytest.approx(np.mean(expected))
    assert result > 0.6
