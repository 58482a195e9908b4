"""The differences between the norms of a comparison, and what they say in plain sentences."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import mean
from typing import Any

import numpy as np

from .bootstrap import Difference, ImageMatches, paired_difference

# Below this AP a model has learned almost nothing, and a difference would be due to chance
MIN_AP = 1.0
# A model above this AP has learned; with a mask AP below `MIN_AP` its mask head has not
LEARNED_AP = 5.0
HIGHER, LOWER, NO_DIFFERENCE = "higher", "lower", "no difference seen"
TOO_LOW, NOT_LEARNED = "too low to compare", "not learned"
WORDS = {"bbox": "box", "segm": "mask"}

# (norm, images per batch, seed) of a training run
Key = tuple[str, int, int]


def differences(
    matches: Mapping[str, Mapping[Key, ImageMatches]], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The AP difference of each pair of norms, at each batch size and over their common seeds.

    Args:
        matches: {"bbox" or "segm": {run: its results on the validation images}}.
        pairs: (norm, baseline), in the order of the report.

    Returns:
        for each "norm", "baseline", "images_per_batch", "of" ("box" or "mask"), "seeds", "verdict",
        the "mean", "low" and "high" difference in percent, and "unlearned", the norms whose mask
        head has learned nothing.
    """
    aps = {
        kind: {key: m.ap(np.ones(len(m.image_ids))) for key, m in found.items()}
        for kind, found in matches.items()
    }
    entries = []
    for kind, found in matches.items():
        batches = dict.fromkeys(images for _, images, _ in found)
        for images, (norm, baseline) in product(batches, pairs):
            tried = [seed for name, batch, seed in found if (name, batch) == (norm, images)]
            seeds = [seed for seed in tried if (baseline, images, seed) in found]
            if not seeds:
                continue
            keys = {name: [(name, images, seed) for seed in seeds] for name in (baseline, norm)}
            gap = paired_difference(*([found[key] for key in side] for side in keys.values()))
            means = {
                name: {k: mean(values[key] for key in side) for k, values in aps.items()}
                for name, side in keys.items()
            }
            unlearned = [name for name in keys if kind == "segm" and _is_unlearned(means[name])]
            highest = max(ap[kind] for ap in means.values())
            entry = {"norm": norm, "baseline": baseline, "images_per_batch": images}
            entry |= {"of": WORDS[kind], "seeds": seeds, "unlearned": unlearned}
            entry |= {"mean": gap.mean, "low": gap.low, "high": gap.high}
            entries.append(entry | {"verdict": _verdict(gap, highest, bool(unlearned))})
    return entries


def _is_unlearned(ap: Mapping[str, float]) -> bool:
    return ap["segm"] < MIN_AP and ap.get("bbox", 0.0) > LEARNED_AP


def _verdict(gap: Difference, highest: float, unlearned: bool) -> str:
    """Classify a difference; `highest` is the AP of the better model."""
    if unlearned:
        return NOT_LEARNED
    if highest < MIN_AP:
        return TOO_LOW
    if not gap.significant:
        return NO_DIFFERENCE
    return HIGHER if gap.mean > 0 else LOWER


def answer(
    gaps: Sequence[Mapping[str, Any]],
    models: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str],
    rates: str = "",
) -> str:
    """The result of a comparison in a few sentences.

    Args:
        gaps: of `differences`.
        models: "models" of the report's results, the baseline first if any of its runs finished.
        failed: {norm: how many of its runs failed and why}, the baseline first.
        rates: the learning rates that the result is about, as the end of a sentence.
    """
    sentences = [f"{norm} FAILED: {reason}." for norm, reason in failed.items()]
    if gaps:
        sentences += _advise(gaps, models)
        sentences.append(_describe_gaps(gaps))
        sentences += _describe_unlearned(gaps, models)
    else:
        aps = (
            f"{model['model']} reaches {word} AP {model[kind]['AP']['mean']:.1f}"
            for model in models
            for kind, word in WORDS.items()
            if kind in model
        )
        sentences.append(f"There is nothing to compare: {', '.join(aps)}.")
    if rates:
        sentences.append(f"This holds for {rates}.")
    return " ".join(sentences)


def _describe_gaps(gaps: Sequence[Mapping[str, Any]]) -> str:
    """All differences in one sentence."""
    several = len({gap["images_per_batch"] for gap in gaps}) > 1
    parts = []
    pairs = dict.fromkeys((g["norm"], g["baseline"], g["images_per_batch"]) for g in gaps)
    for norm, baseline, images in pairs:
        pair = {"norm": norm, "baseline": baseline, "images_per_batch": images}
        mine = [gap for gap in gaps if pair.items() <= gap.items()]
        at = f"at batch size {images} " * several
        parts.append(f"{at}{norm} against {baseline}: {', '.join(map(_describe_gap, mine))}")
    counts = sorted({len(gap["seeds"]) for gap in gaps})
    over = f"over {' to '.join(map(str, counts))} seeds"
    if counts == [1]:
        over = "for one seed, over images only"
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]} (95% intervals {over})."


def _describe_gap(gap: Mapping[str, Any]) -> str:
    of, verdict = f"{gap['of']} AP", gap["verdict"]
    interval = f"{gap['low']:+.1f} to {gap['high']:+.1f}".replace("-", "−")
    if verdict == TOO_LOW:
        return f"{of} {verdict} (both below {MIN_AP:g})"
    if verdict == NOT_LEARNED:
        return f"{of} not compared"
    if verdict == NO_DIFFERENCE:
        return f"{verdict} in {of} ({interval})"
    return f"{of} {abs(gap['mean']):.1f} {verdict} ({interval})"


def _describe_unlearned(
    gaps: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Name every model whose mask head has learned nothing."""
    found = {(norm, gap["images_per_batch"]) for gap in gaps for norm in gap["unlearned"]}
    for model in models:
        if (model["norm"], model["images_per_batch"]) in found:
            mask, box = (model[kind]["AP"]["mean"] for kind in ("segm", "bbox"))
            yield (
                f"The mask head of {model['model']} has learned nothing (mask AP {mask:.1f} beside "
                f"box AP {box:.1f}), which is a matter of its learning rate or of too few "
                "iterations, not of the norm."
            )


def _advise(
    gaps: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Name the norm to use at each batch size.

    It is one that is higher than the baseline in box or mask AP and lower in neither, by the
    intervals; of several, the one with the highest mean AP.
    """
    if max(_mean_ap(model) for model in models) < LEARNED_AP:
        yield f"All are below {LEARNED_AP:g} AP: train for longer before you choose."
        return
    baseline = gaps[0]["baseline"]
    batches = dict.fromkeys(gap["images_per_batch"] for gap in gaps)
    for images in batches:
        verdicts: dict[str, set[str]] = {}
        for gap in gaps:
            if (gap["baseline"], gap["images_per_batch"]) == (baseline, images):
                own = gap["verdict"]
                if own == NOT_LEARNED:
                    # A baseline that has not learned is no argument against the other norm
                    own = LOWER if gap["norm"] in gap["unlearned"] else NO_DIFFERENCE
                verdicts.setdefault(gap["norm"], set()).add(own)
        better = {n for n, own in verdicts.items() if HIGHER in own and LOWER not in own}
        at = f"At batch size {images}, use" if len(batches) > 1 else "Use"
        if better:
            mine = [m for m in models if m["norm"] in better and m["images_per_batch"] == images]
            best = max(
                mine, key=lambda m: mean(m[kind]["AP"]["mean"] for kind in WORDS if kind in m)
            )
            yield f"{at} {best['norm']}."
        elif all(LOWER in own and HIGHER not in own for own in verdicts.values()):
            yield f"{at} {baseline}."
        else:
            yield (
                f"{at} whichever you prefer: no norm is shown to be better than {baseline}. More "
                "seeds or more validation images would narrow the intervals."
            )


def _mean_ap(model: Mapping[str, Any]) -> float:
    """Mean of box AP and mask AP of an entry of "models"."""
    return mean(model[kind]["AP"]["mean"] for kind in WORDS if kind in model)
