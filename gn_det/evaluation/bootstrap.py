"""Paired differences in COCO AP, with confidence intervals bootstrapped over images and seeds."""

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import InputError
from .coco_stats import load_coco, load_detections

RECALLS = np.linspace(0, 1, 101)

# Elements per array: small enough for a CPU's cache
CHUNK = 2**17


@dataclass(frozen=True)
class Difference:
    """AP(other) - AP(baseline) in percent, and its 95% confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class CategoryMatches:
    """The N detections of one category by descending score, matched to its G objects.

    Attributes:
        objects: (G,), image index of each object, without crowds.
        images: (N,), image index of each detection.
        hits: for each IoU threshold, ascending indices of the detections matched to an object.
        ignored: for each IoU threshold, ascending indices of the detections matched to a crowd.
    """

    objects: np.ndarray
    images: np.ndarray
    hits: list[np.ndarray]
    ignored: list[np.ndarray]

    @classmethod
    def from_evaluation(cls, matches: list[dict], index: dict[int, int]) -> "CategoryMatches":
        """Collect pycocotools' matches of the images with objects or detections.

        Args:
            matches: `COCOeval.evalImgs` of one category, without None.
            index: {image id: image index}.
        """
        rows = np.array([index[match["image_id"]] for match in matches])
        counted = [np.count_nonzero(match["gtIgnore"] == 0) for match in matches]
        scores = np.concatenate([match["dtScores"] for match in matches])
        # As in pycocotools: equal scores are ordered by image
        order = np.argsort(-scores, kind="stable")
        matched = np.concatenate([match["dtMatches"] for match in matches], axis=1)[:, order] != 0
        ignored = np.concatenate([match["dtIgnore"] for match in matches], axis=1)[:, order]
        return cls(
            objects=np.repeat(rows, counted),
            images=np.repeat(rows, [len(match["dtScores"]) for match in matches])[order],
            hits=[np.flatnonzero(row) for row in matched & ~ignored],
            ignored=[np.flatnonzero(row) for row in ignored],
        )

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """AP of each resample, from 0 to 1.

        Args:
            weights: (R, I), how often each of I images is in each of R resamples.

        Returns:
            (R,), nan where a resample has no object.
        """
        objects = weights.take(self.objects, axis=1).sum(axis=1, keepdims=True)
        objects[objects == 0] = np.nan
        drawn = weights.take(self.images, axis=1)
        rank = drawn.cumsum(axis=1)
        total = np.zeros(len(weights))
        for hits, ignored in zip(self.hits, self.ignored, strict=True):
            true = drawn.take(hits, axis=1).cumsum(axis=1)
            counted = rank.take(hits, axis=1)
            if len(ignored):
                skipped = drawn.take(ignored, axis=1).cumsum(axis=1)
                skipped = np.pad(skipped, ((0, 0), (1, 0)))
                counted -= skipped.take(np.searchsorted(ignored, hits), axis=1)
            # Precision falls between two hits, so the envelope needs only the precision at hits
            precision = true / (counted + np.spacing(1))
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = np.searchsorted(RECALLS, true / objects, side="right")
            total += (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
        return np.where(np.isnan(objects[:, 0]), np.nan, total / (len(self.hits) * len(RECALLS)))


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """A results file matched to the ground truth once, to compute the AP of any resample.

    Attributes:
        image_ids: (I,), ascending.
        categories: matches of the categories with objects or detections.
    """

    image_ids: np.ndarray
    categories: list[CategoryMatches]

    @classmethod
    def from_results(cls, annotations: Path | COCO, results: Path, iou_type: str) -> "ImageMatches":
        """Match detections to the ground truth with pycocotools.

        Args:
            annotations: ground truth in COCO's instances format, or the result of `load_coco`,
                to load it once for several results files.
            results: detections in COCO's results format, as Detectron2 writes them to
                `inference/coco_instances_results.json`; all on images of `annotations`.
            iou_type: "bbox" or "segm".
        """
        truth = annotations if isinstance(annotations, COCO) else load_coco(annotations)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, load_detections(truth, results, iou_type), iou_type)
            params = evaluation.params
            params.areaRng = params.areaRng[:1]
            image_ids = np.array(params.imgIds)
            index = {image_id: i for i, image_id in enumerate(params.imgIds)}
            categories = []
            # One category at a time: pycocotools' matches need far more memory than CategoryMatches
            for category_id in params.catIds:
                params.catIds = [category_id]
                evaluation.evaluate()
                if matches := [match for match in evaluation.evalImgs if match is not None]:
                    categories.append(CategoryMatches.from_evaluation(matches, index))
        return cls(image_ids, categories)

    def ap(self, weights: np.ndarray) -> float:
        """COCO's AP (IoU 0.50:0.95, all areas, 100 detections per image), in percent.

        It equals pycocotools' AP on a dataset with copied images. The only exception is equal
        scores within one image and category: copies of the first detection all precede copies of
        the second.

        Args:
            weights: (I,), how often each image is in the resample, in the order of `image_ids`.

        Returns:
            The mean over the categories with objects in the resample; nan if there are none.
        """
        return float(self.resampled_ap(weights[None])[0])

    def resampled_ap(self, weights: np.ndarray) -> np.ndarray:
        """`ap` of many resamples.

        Args:
            weights: (R, I), as in `ap`.

        Returns:
            (R,).
        """
        weights = weights.astype(float)
        total, present = np.zeros((2, len(weights)))
        for category in self.categories:
            step = max(1, CHUNK // max(1, len(category.images)))
            for start in range(0, len(weights), step):
                chunk = slice(start, start + step)
                ap = category.average_precision(weights[chunk])
                total[chunk] += np.nan_to_num(ap)
                present[chunk] += ~np.isnan(ap)
        present[present == 0] = np.nan
        return 100 * total / present


def paired_difference(
    baseline: Sequence[ImageMatches],
    other: Sequence[ImageMatches],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Difference:
    """Mean over seeds of AP(other) - AP(baseline), with a 95% confidence interval.

    The interval covers the variation over validation images, by bootstrap, and that over seeds, by
    Student's t, each counted once: see `combined_half_width`. With one seed it covers only the
    variation over images.

    Args:
        baseline: results of the baseline, one per seed.
        other: results of the other model on the same images, with the same seeds.
        draws: number of resamples of the images, alike for all models and seeds; resamples without
            any object are left out.
        seed: of the resampling.

    Returns:
        The difference in percent.

    Raises:
        InputError: if there are no pairs, or the numbers of seeds or the images differ.
    """
    _check_pairs(baseline, other)
    rng = np.random.default_rng(seed)
    images = len(baseline[0].image_ids)
    resamples = rng.multinomial(images, np.full(images, 1 / images), size=draws)
    weights = np.concatenate([np.ones((1, images), dtype=int), resamples])
    sides = [np.stack([m.resampled_ap(weights) for m in side]) for side in (baseline, other)]
    gaps = sides[1] - sides[0]  # (seeds, 1 + draws)
    mean = float(gaps[:, 0].mean())
    if len(baseline) == 1:
        low, high = np.nanpercentile(gaps[0, 1:], (2.5, 97.5))
        return Difference(mean, float(low), float(high))
    half = combined_half_width(
        np.stack([side[:, 0] for side in sides]),
        np.nanvar(gaps[:, 1:].mean(0), ddof=1),
        np.nanvar(gaps[:, 1:], axis=1, ddof=1).mean(),
    )
    # A difference in AP is at most 100
    return Difference(mean, max(mean - half, -100.0), min(mean + half, 100.0))


def combined_half_width(aps: np.ndarray, image_variance: float, single_variance: float) -> float:
    """Half the width of the 95% interval of a difference of means over seeds.

    It is the root of the squared half-widths over seeds and over images. The seeds of the two
    models are independent, and their variances are pooled, for 2 (S - 1) degrees of freedom. The
    bootstrapped variance of the mean over seeds contains a share of what differs from seed to seed
    (seeds that are better on other images). The variance over seeds contains it too, so it is
    subtracted once. In simulations 94 to 98% of the intervals cover the truth, for 2 to 5 seeds.

    Args:
        aps: (2, S), AP of each model and seed in percent, S at least 2.
        image_variance: variance over resampled images of the mean difference over seeds.
        single_variance: the same for the difference of a single seed, on average.

    Returns:
        the half-width in percent.
    """
    seeds = aps.shape[1]
    # With independent seeds, averaging divides their own part of the variance by S
    own_part = max(single_variance - image_variance, 0.0) / (seeds - 1)
    common = max(image_variance - own_part, 0.0)
    over_seeds = aps.var(axis=1, ddof=1).sum() / seeds
    freedom = 2 * (seeds - 1)
    return math.sqrt(student_quantile(freedom) ** 2 * over_seeds + 1.96**2 * common)


def student_quantile(freedom: float) -> float:
    """The 97.5% quantile of Student's t, to four digits.

    Args:
        freedom: degrees of freedom, 1 or more.
    """
    angles, covered = _student(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(0.95, covered, angles))


def student_tail(t: float, freedom: float) -> float:
    """The probability that Student's t is farther from 0 than `t`, to four decimals.

    Args:
        t: 0 or larger.
        freedom: degrees of freedom, 1 or more.
    """
    angles, covered = _student(freedom)
    inside = float(np.interp(math.atan(t / math.sqrt(freedom)), angles, covered))
    return min(max(1.0 - inside, 0.0), 1.0)


def _student(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Angles, and the probability that |t| is at most sqrt(freedom) tan(angle)."""
    # The density is proportional to cos(angle)^(freedom - 1)
    angles = np.linspace(0, math.pi / 2, 20_001)[:-1]
    density = np.cos(angles) ** (freedom - 1)
    mass = np.cumsum(density) - (density + density[0]) / 2
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return angles, 2 * mass * angles[1] / whole


def _check_pairs(baseline: Sequence[ImageMatches], other: Sequence[ImageMatches]) -> None:
    if len(baseline) != len(other) or not baseline:
        raise InputError(
            "paired differences need the same seeds of both models, but there are "
            f"{len(baseline)} results of the baseline and {len(other)} of the other model"
        )
    first = baseline[0].image_ids
    if any(not np.array_equal(first, matches.image_ids) for matches in (*baseline, *other)):
        raise InputError(
            "paired differences need results on the same images, but the image ids differ"
        )
