"""Differences between many models of which each has a few training runs, and which are shown.

The rule was fixed before the runs that it judges. The variance of a model's AP over seeds is
moderated: drawn towards the value that all models have in common, as strongly as they agree on it
(Smyth 2004, "Linear models and empirical Bayes methods for assessing differential expression in
microarray experiments", Section 6). The variance over images is bootstrapped. P values are
corrected for their number by Holm's method.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gn_det.evaluation.bootstrap import ImageMatches, student_quantile, student_tail

LEVEL = 0.05
# Below this AP a detector has learned too little to be compared
MIN_AP = 5.0
HOLDS, FAILS, OPEN, UNLEARNED = "holds", "does not hold", "undecided", "too little learned"
# Degrees of freedom from which on Student's distribution is the normal one
MANY = 10_000.0
# The prior counts less than it is estimated to, and at most so much: with a dozen models it is
# itself uncertain, and without this the noisiest models' intervals are too narrow
TRUST, MOST = 0.5, 8.0


class Runs(NamedTuple):
    """The training runs of one model.

    Args:
        aps: (S,), AP of each of S seeds, in percent; S is at least 2.
        resampled: (S, R), AP of each seed on R resamples of the images, the same for all models.
    """

    aps: np.ndarray
    resampled: np.ndarray

    @classmethod
    def from_matches(cls, matches: Sequence[ImageMatches], draws: int = 1000) -> "Runs":
        """Compute AP and resample the images; the resamples depend on their number alone.

        Args:
            matches: of each seed.
            draws: number of resamples.
        """
        images = len(matches[0].image_ids)
        rng = np.random.default_rng(0)
        resamples = rng.multinomial(images, np.full(images, 1 / images), size=draws)
        weights = np.concatenate([np.ones((1, images), dtype=int), resamples])
        found = np.stack([m.resampled_ap(weights) for m in matches])
        return cls(found[:, 0], found[:, 1:])

    @property
    def own_variance(self) -> float:
        """Variance over images that differs from seed to seed, as a part of the mean's variance."""
        single = np.nanvar(self.resampled, axis=1, ddof=1).mean()
        together = np.nanvar(self.resampled.mean(0), ddof=1)
        # With independent seeds, averaging divides their own part by S
        return float(max(single - together, 0.0) / (len(self.aps) - 1))


class Gap(NamedTuple):
    """A difference in AP in percent, its 95% interval, and the P value of no difference."""

    difference: float
    low: float
    high: float
    p: float


class Prior(NamedTuple):
    """What all models have in common: the variance over seeds, and its degrees of freedom."""

    variance: float
    freedom: float


def common_variance(aps: Sequence[np.ndarray]) -> Prior:
    """Estimate the prior from the AP of all models (Smyth 2004, Section 6.2).

    Args:
        aps: (S,) of each model, with at least 2 seeds.
    """
    freedom = torch.tensor([len(a) - 1.0 for a in aps], dtype=torch.float64)
    variances = torch.tensor([max(a.var(ddof=1), 1e-6) for a in aps], dtype=torch.float64)
    half = freedom / 2
    logs = variances.log() - torch.digamma(half) + half.log()
    centre = float(logs.mean())
    excess = float(logs.var()) if len(aps) > 1 else 0.0
    excess -= float(torch.polygamma(1, half).mean())
    if excess <= 0:
        return Prior(math.exp(centre), MOST)
    prior = _inverse_trigamma(excess)
    correction = float(torch.digamma(torch.tensor(prior))) - math.log(prior)
    return Prior(math.exp(centre + correction), min(TRUST * 2 * prior, MOST))


def _inverse_trigamma(value: float) -> float:
    """The x with trigamma(x) = value, by bisection: trigamma falls."""
    low, high = 1e-6, MANY
    for _ in range(100):
        middle = math.sqrt(low * high)
        falls = torch.polygamma(1, torch.tensor(middle, dtype=torch.float64)) > value
        low, high = (middle, high) if falls else (low, middle)
    return low


def compare(below: Runs, above: Runs, prior: Prior) -> Gap:
    """AP of `above` - AP of `below`, over seeds and images.

    Args:
        below, above: models on the same images.
        prior: of the variance over seeds.
    """
    mean = float(above.aps.mean() - below.aps.mean())
    parts = []  # (variance of the mean, degrees of freedom)
    for runs in (below, above):
        own = len(runs.aps) - 1
        both = prior.freedom * prior.variance + own * runs.aps.var(ddof=1)
        variance = float(both) / (prior.freedom + own)
        parts.append((variance / len(runs.aps), prior.freedom + own))
    over_images = np.nanvar(above.resampled.mean(0) - below.resampled.mean(0), ddof=1)
    # What differs from seed to seed is in the variance over seeds already
    shared = max(float(over_images) - below.own_variance - above.own_variance, 0.0)
    parts.append((shared, MANY))
    total = max(sum(variance for variance, _ in parts), 1e-12)
    # Welch and Satterthwaite
    freedom = min(total**2 / sum(v**2 / f for v, f in parts), MANY)
    error = math.sqrt(total)
    half = student_quantile(freedom) * error
    return Gap(mean, mean - half, mean + half, student_tail(abs(mean) / error, freedom))


def holm(values: Sequence[float]) -> list[float]:
    """P values corrected for their number by Holm's step-down method."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(values) - rank) * values[i], 1.0))
        corrected[i] = largest
    return corrected


def judge(
    runs: Mapping[tuple[str, str], Runs],
    pairs: Sequence[tuple[str, str]],
    kinds: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The differences and verdicts of each pair of models.

    Args:
        runs: by kind of AP and name of the model.
        pairs: (name of the model that should be above, name of the other).
        kinds: {kind of AP: key in the result}.

    Returns:
        for each pair and kind the "difference", "low" and "high" in percent, "p", "corrected p" and
        "verdict".
    """
    # Models that have learned nothing hardly vary
    priors = {}
    for kind in kinds:
        aps = [r.aps for (of, _), r in runs.items() if of == kind]
        priors[kind] = common_variance([a for a in aps if a.mean() >= MIN_AP] or aps)
    gaps = {
        (kind, pair): compare(runs[kind, pair[1]], runs[kind, pair[0]], priors[kind])
        for pair in pairs
        for kind in kinds
    }
    corrected = dict(zip(gaps, holm([gap.p for gap in gaps.values()]), strict=True))
    return [
        {
            word: {
                **gaps[kind, pair]._asdict(),
                "corrected p": corrected[kind, pair],
                "verdict": _verdict(
                    gaps[kind, pair], corrected[kind, pair], [runs[kind, name] for name in pair]
                ),
            }
            for kind, word in kinds.items()
        }
        for pair in pairs
    ]


def _verdict(gap: Gap, p: float, pair: Sequence[Runs]) -> str:
    if max(runs.aps.mean() for runs in pair) < MIN_AP:
        return UNLEARNED
    if p >= LEVEL:
        return OPEN
    return HOLDS if gap.difference > 0 else FAILS
