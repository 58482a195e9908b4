"""Training and validation pictures, told apart for good."""

import re
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
    """Which pictures are for validation.

    A hash decides, so that a picture stays where it is when others are added. Pictures whose files
    are the same are never separated, nor are those that `group_by` gives one key.

    Args:
        entries: the `images` of a COCO instances file.
        digests: of the pictures' files, in the same order.
        val_fraction: share of all groups, between 0 and 1, that goes to validation on average.
        group_by: a field of `images`, or a regular expression that is searched in `file_name`; its
            first bracket, or else all that it matches, is the key.

    Raises:
        InputError: for a fraction out of range, a key that pictures lack, and if nothing would be
            left on one side.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"--val-fraction {val_fraction} must be between 0 and 1, as 0.2")
    keys = list(digests)
    if group_by is not None:
        # A file that two groups share joins them
        keys = _join([group_key(entry, group_by) for entry in entries], digests)
    # A group may have a name that UTF-8 has no bytes for
    hashes = [sha256(key.encode(errors="surrogatepass")).hexdigest() for key in keys]
    chosen = [int(digest, 16) / 16**64 < val_fraction for digest in hashes]
    if all(chosen) or not any(chosen):
        side = "training" if all(chosen) else "validation"
        raise InputError(
            f"--val-fraction {val_fraction} of {len(set(keys))} groups leaves none for {side}: "
            "give another fraction, or a validation set with --val"
        )
    return chosen


def group_key(entry: Mapping[str, Any], group_by: str) -> str:
    """What a picture shares with all of its group."""
    if group_by in entry:
        return str(entry[group_by])
    try:
        found = re.search(group_by, str(entry["file_name"]))
    except re.error as error:
        raise InputError(f"--group-by {group_by} is no regular expression: {error}") from None
    if not found:
        raise InputError(
            f"--group-by {group_by} is neither a field of {printable(entry['file_name'])}'s entry, "
            "nor found in that name"
        )
    return found[1] if found.groups() and found[1] is not None else found[0]


def _join(keys: Sequence[str], digests: Sequence[str]) -> list[str]:
    """One key for all groups that are linked by equal files: the least of theirs."""
    parent = {key: key for key in keys}

    def root(key: str) -> str:
        while parent[key] != key:
            # Halved each time, or long chains would take a time that grows with their square
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    first: dict[str, str] = {}
    for key, digest in zip(keys, digests, strict=True):
        one, two = sorted((root(key), root(first.setdefault(digest, key))))
        parent[two] = one
    return [root(key) for key in keys]
