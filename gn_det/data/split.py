"""A reproducible split of images into training and validation."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from ..errors import InputError, printable


def split(
    entries: Sequence[Mapping[str, Any]],
    digests: Sequence[str],
    val_fraction: float,
    group_by: str | None = None,
) -> list[bool]:
    """Assign each image to training or validation.

    A hash decides, so that an image keeps its assignment when other images are added. Images with
    identical files always stay together, and so do versions of one image and images with the same
    group key. With groups,
    validation gets those that fit into `val_fraction` of the images, in the order of their hashes,
    and one more if that comes nearer.

    Args:
        entries: the `images` of a COCO instances file.
        digests: SHA-256 of the image files, in the same order.
        val_fraction: share of the images that goes to validation, between 0 and 1.
        group_by: a field of `images`, or a regular expression that is searched in `file_name`. The
            group key is its first capturing group, or the whole match if it has none. None splits
            by image file.

    Returns:
        for each entry whether it belongs to validation.

    Raises:
        InputError: if the fraction is out of range, an image has no group key, or one of the two
            sets would be empty.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"--val-fraction {val_fraction} must be between 0 and 1, such as 0.2")
    keys = list(digests)
    if group_by is not None:
        # Groups that share a file are merged
        keys = _join([group_key(entry, group_by) for entry in entries], digests)
    names = [version_of(str(entry["file_name"])) for entry in entries]
    keys = _join(keys, [name or key for name, key in zip(names, keys, strict=True)])
    # Group keys may contain lone surrogates, which UTF-8 cannot encode
    hashes = [sha256(key.encode(errors="surrogatepass")).hexdigest() for key in keys]
    chosen = [int(digest, 16) / 16**64 < val_fraction for digest in hashes]
    if group_by is not None and len(set(hashes)) > 1:
        first = _choose_groups(hashes, val_fraction)
        chosen = [digest in first for digest in hashes]
    if all(chosen) or not any(chosen):
        side = "training" if all(chosen) else "validation"
        raise InputError(
            f"--val-fraction {val_fraction} of {len(set(keys))} groups leaves none for {side}: "
            "use another fraction, or pass a validation set with --val"
        )
    return chosen


def version_of(file_name: str) -> str:
    """The original image of an augmented copy that Roboflow has named; "" for other names."""
    match = re.fullmatch(r"(.+)\.rf\.[0-9A-Za-z]{8,}\.\w+", file_name)
    return match[1] if match else ""


def _choose_groups(hashes: Sequence[str], share: float) -> set[str]:
    """Groups that hold nearly this share of the images; not none, and not all.

    Args:
        hashes: the hash of each image's group.
        share: of the images, between 0 and 1.
    """
    sizes, missing = Counter(hashes), share * len(hashes)
    chosen: set[str] = set()
    for digest in sorted(sizes):
        if sizes[digest] <= missing:
            chosen.add(digest)
            missing -= sizes[digest]
    left = [digest for digest in sorted(sizes) if digest not in chosen]
    nearest = min(left, key=lambda digest: abs(missing - sizes[digest]))
    if not chosen or (len(left) > 1 and abs(missing - sizes[nearest]) < missing):
        chosen.add(nearest)
    return chosen


def group_key(entry: Mapping[str, Any], group_by: str) -> str:
    """The group key of an image; see `split`."""
    if group_by in entry:
        return str(entry[group_by])
    try:
        match = re.search(group_by, str(entry["file_name"]))
    except re.error as error:
        raise InputError(f"--group-by {group_by} is not a regular expression: {error}") from None
    if not match:
        raise InputError(
            f"--group-by {group_by} is neither a field of images in the annotation file, nor a "
            f"regular expression that matches {printable(entry['file_name'])}"
        )
    return match[1] if match.groups() and match[1] is not None else match[0]


def _join(keys: Sequence[str], digests: Sequence[str]) -> list[str]:
    """Merge groups that share a file (union-find); a merged group gets its smallest key."""
    parent = {key: key for key in keys}

    def root(key: str) -> str:
        while parent[key] != key:
            # Path halving, since long chains would take quadratic time
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    first: dict[str, str] = {}
    for key, digest in zip(keys, digests, strict=True):
        one, two = sorted((root(key), root(first.setdefault(digest, key))))
        parent[two] = one
    return [root(key) for key in keys]
