"""The cells of a comparison: norms x batch sizes x seeds, which differ only in the norm."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

from detectron2.config import CfgNode

from ..checkpoint.facts import GROUP_NORM, NORM_FACTS, PIXELS, STRIDE
from ..config import flatten, value_of
from ..errors import InputError
from ..modeling.norm import NORM_KEYS, is_group_norm, part_norm_keys, parts_with_norm

NORMS = ("FrozenBN", "BN", "SyncBN", "BRN", "GN", "LN", "IN")
# BN* as everybody uses it, GN in FPN and heads alone, and GN everywhere
DEFAULT_NORMS = ("FrozenBN", "FrozenBN/GN", "GN")


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison.

    Args:
        norm: of the backbone, as "GN", or BACKBONE/HEADS, as "FrozenBN/GN"; HEADS is the norm of
            FPN and RoI heads.
        images: images per batch.
        seed: `SEED` of the run.
    """

    norm: str
    images: int
    seed: int

    def __str__(self) -> str:
        return f"{self.norm}, batch size {self.images}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Name of its output folder."""
        return f"{self.norm.replace('/', '-')}_{self.images}_seed{self.seed}"


def make_cells(norms: Sequence[str], batches: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """All cells, ordered by seed, so that an interrupted comparison has complete seeds.

    Args:
        norms: as in `Cell`.
        batches: images per batch.
        seeds: 0 or larger.

    Raises:
        InputError: for unknown norms, duplicate values, and batches or seeds out of range.
    """
    for flag, values in (("norms", norms), ("images-per-batch", batches), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise InputError(f"--{flag} {' '.join(map(str, values))}: remove the duplicate values")
    for norm in norms:
        if not all(part in NORMS for part in norm.split("/")) or norm.count("/") > 1:
            raise InputError(f"--norms {norm}: use {', '.join(NORMS)}, or two as BACKBONE/HEADS")
    if any(batch < 1 for batch in batches):
        raise InputError("--images-per-batch must be 1 or larger")
    if any(seed < 0 for seed in seeds):
        raise InputError("--seeds must be 0 or larger: Detectron2 replaces others by random seeds")
    order = product(seeds, batches, norms)
    return [Cell(norm, images, seed) for seed, images, norm in order]


def split_norm(norm: str) -> tuple[str, str]:
    """The norm of the backbone, and of FPN and RoI heads.

    By default the heads have a norm only with GN, as in the paper and in Detectron2's configs.
    """
    backbone, slash, heads = norm.partition("/")
    return backbone, heads if slash else backbone * is_group_norm(backbone)


def describe_norms(cfg: CfgNode) -> str:
    """The parts of a model by their norm, as "GN: backbone, FPN"."""
    parts: dict[str, list[str]] = {}
    for part in parts_with_norm(cfg):
        if norm := value_of(cfg, part_norm_keys(cfg)[part]):
            parts.setdefault(str(norm), []).append(part)
    return "; ".join(f"{norm}: {', '.join(names)}" for norm, names in parts.items())


def norm_keys(norm: str, cfg: CfgNode) -> dict[str, str]:
    """The values of all `NORM` keys; "" for parts of this model that have no norm layers."""
    backbone, heads = split_norm(norm)
    with_norm = parts_with_norm(cfg)
    return {
        key: (backbone if part == "backbone" else heads) if part in with_norm else ""
        for part, key in part_norm_keys(cfg).items()
    }


def compared_pairs(norms: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs (norm, baseline) whose difference is reported.

    Every norm is compared with the first. A GN backbone is also compared with the other backbones
    that have the same heads, which shows what the backbone alone contributes.
    """
    pairs = [(norm, norms[0]) for norm in norms[1:]]
    for norm, other in product(norms[1:], repeat=2):
        (one, heads), (two, same) = split_norm(norm), split_norm(other)
        if heads == same and is_group_norm(one) and not is_group_norm(two):
            pairs.append((norm, other))
    return pairs


def check_pairs(
    configs: Mapping[Cell, CfgNode],
    own: Mapping[str, Mapping[str, Any]] | None = None,
    tuned: Iterable[str] = (),
) -> None:
    """Refuse cells of equal batch size and seed that differ in more than the norm and its recipe.

    Keys that belong to the initial weights may differ too: pixel mean and standard deviation,
    strides, and GN's groups.

    Args:
        configs: of all cells.
        own: {norm: {key: value}}, the keys of a norm's own recipe, in which it may differ. Its
            config must have that value.
        tuned: keys that were chosen for each norm with equal effort, and may differ.

    Raises:
        InputError: naming the keys that differ.
    """
    allowed = {*NORM_KEYS.values(), *NORM_FACTS, *PIXELS, *GROUP_NORM, STRIDE, *tuned}
    allowed |= {"MODEL.WEIGHTS", "OUTPUT_DIR"}
    own = own or {}

    def pair(cell: Cell) -> tuple[int, int]:
        return cell.images, cell.seed

    for _, group in groupby(sorted(configs, key=pair), pair):
        first, *others = group
        for other in others:
            one, two = flatten(configs[first]), flatten(configs[other])
            keys = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
            mine, theirs = own.get(first.norm, {}), own.get(other.norm, {})
            explained = {
                key
                for key in mine.keys() | theirs.keys()
                if one[key] == mine.get(key, one[key]) and two[key] == theirs.get(key, two[key])
            }
            if wrong := [key for key in keys if key not in allowed | explained]:
                values = ", ".join(f"{key} {one.get(key)} and {two.get(key)}" for key in wrong)
                raise InputError(f"{first} and {other} differ in more than the norm: {values}")
