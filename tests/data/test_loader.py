"""Training batches are those of Detectron2, for any first batch and number of workers."""

import multiprocessing
import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import ROOT, shapes_config
from detectron2.data import build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler

from gn_det.data import worker_limits
from gn_det.data.loader import TrainLoader, UnreadableSample, build_train_loader, seeded

RECORDS = [{"file_name": str(i), "width": 3 + i % 3, "height": 4} for i in range(10)]


def noisy(record: dict) -> dict:
    """A mapper that draws from the generators of PyTorch and NumPy, and fails on one record."""
    if record["file_name"] == "7":
        raise OSError("no such file")
    return {**record, "drawn": (torch.rand(()).item(), np.random.rand())}


def loader(workers: int = 0, group: bool = True, first: int = 0, mapper=noisy) -> TrainLoader:
    made = TrainLoader(
        RECORDS,
        mapper,
        lambda records: TrainingSampler(len(records)),
        batch_size=2,
        group_by_shape=group,
        num_workers=workers,
    )
    made.start_at(11, first)
    return made


@pytest.mark.parametrize("group", [False, True])
def test_starting_at_a_batch_gives_the_same_later_batches(group):
    batches = list(islice(loader(group=group), 30))
    assert list(islice(loader(group=group, first=17), 13)) == batches[17:]
    assert list(islice(loader(2, group, first=17), 13)) == batches[17:], "two workers"


def test_order_equals_that_of_detectron2():
    with seeded(11):
        sampler = TrainingSampler(len(RECORDS))
    expected = islice(AspectRatioGroupedDataset((RECORDS[i] for i in sampler), 2), 20)
    names = [
        [x.file_name if isinstance(x, UnreadableSample) else x["file_name"] for x in batch]
        for batch in islice(loader(), 20)
    ]
    assert names == [[record["file_name"] for record in batch] for batch in expected]


def test_loading_leaves_the_global_generators_unchanged():
    batches = iter(loader())
    next(batches)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(batches)
    assert torch.equal(torch.rand(3), expected)


def test_each_sample_has_its_own_random_numbers():
    samples = [s for batch in islice(loader(), 30) for s in batch if isinstance(s, dict)]
    assert len({sample["drawn"] for sample in samples}) == len(samples) > 50


def test_unreadable_samples_are_marked():
    samples = [sample for batch in islice(loader(), 30) for sample in batch]
    unreadable = {sample for sample in samples if isinstance(sample, UnreadableSample)}
    assert unreadable == {UnreadableSample("7", "no such file")}


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_loader_from_a_config(sampler):
    cfg = shapes_config(
        *("mask_rcnn_R_18_FPN_gn", "DATALOADER.SAMPLER_TRAIN", sampler),
        *("DATALOADER.REPEAT_THRESHOLD", 0.5),
    )
    first, resumed = build_train_loader(cfg), build_train_loader(cfg)
    first.start_at(3, 0)
    resumed.start_at(3, 4)
    batches = list(islice(first, 6))
    for one, two in zip(batches[4:], islice(resumed, 2), strict=True):
        assert [x["file_name"] for x in one] == [x["file_name"] for x in two]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(one, two, strict=True))
    expected = next(iter(build_detection_train_loader(cfg)))
    assert [x.keys() for x in batches[0]] == [x.keys() for x in expected]


FEW_FILES = """
import resource, sys
from itertools import islice
import torch
import test_loader
from test_loader import loader
if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
for batch in islice(loader(3, mapper=large), 40):
    print([x["image"].sum().item() for x in batch])
"""


def large(record: dict) -> dict:
    return {**record, "image": torch.rand(9, 200, 200), "mask": torch.rand(200) > 0.5}


@pytest.mark.parametrize("free", [0, 50_000_000])
def test_little_shared_memory(free, monkeypatch):
    """As in a container: the same batches, without or with processes that do not share them."""
    expected = list(islice(loader(mapper=large), 6))
    monkeypatch.setattr(worker_limits, "_free_shared_memory", lambda: free)
    for one, two in zip(expected, islice(loader(2, mapper=large), 6), strict=True):
        for x, y in zip(one, two, strict=True):
            assert torch.equal(x["image"], y["image"]) and torch.equal(x["mask"], y["mask"])


def test_few_open_files():
    """PyTorch's way of sharing tensors takes a file for each, and stops without one."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/data'}"}
    outputs = []
    for more in ([], ["few"]):
        words = [sys.executable, "-c", FEW_FILES.replace("large", "test_loader.large"), *more]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 40


def test_spawned_workers():
    """As on macOS and Windows, where processes cannot be forked."""
    before = multiprocessing.get_start_method(allow_none=True)
    expected = list(islice(loader(), 5))
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert list(islice(loader(2), 5)) == expected
    finally:
        multiprocessing.set_start_method(before, force=True)
