"""Is one model's COCO AP another's? Paired differences, bootstrapped over pictures and seeds."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import InputError
from .coco_stats import load_coco, load_detections

RECALLS = np.linspace(0, 1, 101)

# Numbers held at once, few enough for a CPU's cache
CHUNK = 2**17


@dataclass(frozen=True)
class Difference:
    """AP(other) - AP(baseline), in percent, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def seen(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class CategoryMatches:
    """One category's detections by falling score, of N, and its ground truth, of G.

    Attributes:
        objects: (G,) picture of each object, crowds left out.
        pictures: (N,) picture of each detection.
        hits: for every IoU threshold, which detections found an object, ascending.
        ignored: for every IoU threshold, which detections found a crowd, ascending.
    """

    objects: np.ndarray
    pictures: np.ndarray
    hits: list[np.ndarray]
    ignored: list[np.ndarray]

    @classmethod
    def from_evaluation(cls, matches: list[dict], index: dict[int, int]) -> "CategoryMatches":
        """From pycocotools' matches of each picture with objects or detections.

        Args:
            matches: the category's `COCOeval.evalImgs`, without None.
            index: which row of the weights an image id is.
        """
        rows = np.array([index[match["image_id"]] for match in matches])
        counted = [np.count_nonzero(match["gtIgnore"] == 0) for match in matches]
        scores = np.concatenate([match["dtScores"] for match in matches])
        # As in pycocotools: among equal scores the first picture's come first.
        order = np.argsort(-scores, kind="stable")
        found = np.concatenate([match["dtMatches"] for match in matches], axis=1)[:, order] != 0
        ignored = np.concatenate([match["dtIgnore"] for match in matches], axis=1)[:, order]
        return cls(
            objects=np.repeat(rows, counted),
            pictures=np.repeat(rows, [len(match["dtScores"]) for match in matches])[order],
            hits=[np.flatnonzero(row) for row in found & ~ignored],
            ignored=[np.flatnonzero(row) for row in ignored],
        )

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """AP of each resample, from 0 to 1; nan where the resample has no object.

        Args:
            weights: (R, I), how often each of I pictures is in each of R resamples.

        Returns:
            (R,).
        """
        objects = weights.take(self.objects, axis=1).sum(axis=1, keepdims=True)
        objects[objects == 0] = np.nan
        drawn = weights.take(self.pictures, axis=1)
        rank = drawn.cumsum(axis=1)
        total = np.zeros(len(weights))
        for hits, ignored in zip(self.hits, self.ignored, strict=True):
            true = drawn.take(hits, axis=1).cumsum(axis=1)
            counted = rank.take(hits, axis=1)
            if len(ignored):
                skipped = drawn.take(ignored, axis=1).cumsum(axis=1)
                skipped = np.pad(skipped, ((0, 0), (1, 0)))
                counted -= skipped.take(np.searchsorted(ignored, hits), axis=1)
            # Between two hits precision only falls, so the hits' own are enough for the envelope.
            precision = true / (counted + np.spacing(1))
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = np.searchsorted(RECALLS, true / objects, side="right")
            total += (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
        return np.where(np.isnan(objects[:, 0]), np.nan, total / (len(self.hits) * len(RECALLS)))


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """A results file matched against the ground truth once, for the AP of any resample.

    Attributes:
        image_ids: (I,) ascending.
        categories: those that have objects or detections.
    """

    image_ids: np.ndarray
    categories: list[CategoryMatches]

    @classmethod
    def from_results(cls, annotations: Path | COCO, results: Path, iou_type: str) -> "ImageMatches":
        """Match detections against the ground truth, by pycocotools.

        Args:
            annotations: ground truth in COCO's instances format, or what `load_coco` made of it,
                to read it once for several results files.
            results: detections in COCO's results format, as Detectron2 writes them to
                `inference/coco_instances_results.json`; all are of pictures in `annotations`.
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
            # One at a time, for pycocotools' matches are many times the size of what is kept.
            for category_id in params.catIds:
                params.catIds = [category_id]
                evaluation.evaluate()
                if matches := [match for match in evaluation.evalImgs if match is not None]:
                    categories.append(CategoryMatches.from_evaluation(matches, index))
        return cls(image_ids, categories)

    def ap(self, weights: np.ndarray) -> float:
        """COCO's AP (IoU 0.50:0.95, all areas, 100 detections a picture), in percent.

        It is that of a data set with copied pictures, but where one picture's detections of one
        category have equal scores: here the first one's copies all come before the second's.

        Args:
            weights: (I,), how often each picture is there, in the order of `image_ids`.

        Returns:
            The mean over the categories with ground truth in the resample; nan if none has any.
        """
        return float(self.resampled_ap(weights[None])[0])

    def resampled_ap(self, weights: np.ndarray) -> np.ndarray:
        """`ap` of many resamples: (R, I) -> (R,)."""
        weights = weights.astype(float)
        total, present = np.zeros((2, len(weights)))
        for category in self.categories:
            step = max(1, CHUNK // max(1, len(category.pictures)))
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
    """Mean over seeds of AP(other) - AP(baseline), with a bootstrapped 95 % interval.

    Every draw resamples the pictures, alike for all models, and the pairs. Of S pairs a bootstrap
    sees (S - 1) / S of the seeds' variance, and takes it for known; the seeds' part is widened to
    what Student's t makes of so few. Where seeds differ by less than pictures do, the interval is
    on the wide side; with one pair it is of the pictures alone.

    Args:
        baseline: a model's results, one of each seed.
        other: another model's on the same ground truth; `other[s]` has the seed of `baseline[s]`.
        draws: resamples, from which the 2.5 and 97.5 percentiles are taken; those without any
            object are left out.
        seed: of the resampling.

    Raises:
        InputError: the models have unequal numbers of seeds, or none, or other pictures.
    """
    _check_pairs(baseline, other)
    rng = np.random.default_rng(seed)
    images = len(baseline[0].image_ids)
    resamples = rng.multinomial(images, np.full(images, 1 / images), size=draws)
    weights = np.concatenate([np.ones((1, images), dtype=int), resamples])
    pairs = zip(baseline, other, strict=True)
    table = [b.resampled_ap(weights) - a.resampled_ap(weights) for a, b in pairs]
    whole, *resampled = np.stack(table, axis=1)
    drawn = rng.integers(len(baseline), size=(draws, len(baseline)))
    over_pairs = np.array(resampled).mean(axis=1)
    redrawn = np.take_along_axis(np.array(resampled), drawn, axis=1).mean(axis=1)
    means = over_pairs + _widening(len(baseline)) * (redrawn - over_pairs)
    # No two APs are further apart
    means = means.clip(-100, 100)
    low, high = np.nanpercentile(means, (2.5, 97.5))
    return Difference(float(whole.mean()), float(low), float(high))


def _widening(pairs: int) -> float:
    """By how much the resampled spread of so few pairs falls short of Student's 95% interval."""
    if pairs == 1:
        return 1.0
    freedom = pairs - 1
    # Above 4 degrees of freedom Cornish and Fisher's expansion is right to 1%
    expansion = 1 + 1.21 / freedom + 1.44 / freedom**2
    quantile = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}.get(freedom, 1.960 * expansion)
    return quantile / 1.960 * (pairs / freedom) ** 0.5


def _check_pairs(baseline: Sequence[ImageMatches], other: Sequence[ImageMatches]) -> None:
    if len(baseline) != len(other) or not baseline:
        raise InputError(
            f"paired differences take both models at the same seeds, but there are {len(baseline)} "
            f"results of the baseline and {len(other)} of the other model"
        )
    first = baseline[0].image_ids
    if any(not np.array_equal(first, matches.image_ids) for matches in (*baseline, *other)):
        raise InputError("paired differences take results on the same pictures: theirs differ")
