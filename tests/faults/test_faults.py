"""A short form of `make faults`: faults of the machine, and damaged or malicious files."""

import pytest
from campaign import campaign
from faults import FAULTS
from fuzz import READERS, fuzz

KINDS = [
    "SIGTERM in an iteration",
    "SIGKILL while a checkpoint is written",
    "disk full, read-only or broken",
    "image missing or damaged, skipped",
]


def test_resuming_after_a_fault_is_exact(tmp_path):
    assert set(KINDS) <= set(FAULTS)
    assert campaign(KINDS, seed=1, at_once=1, folder=tmp_path) == [""] * len(KINDS)


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_refused(kind, tmp_path):
    assert fuzz(kind, 60, seed=1, folder=tmp_path / kind) == []
