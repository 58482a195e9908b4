"""Training batches: those of Detectron2, wherever they are begun and however many load them."""

from itertools import islice

import numpy as np
import pytest
import torch
from conftest import shapes_config
from detectron2.data import build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler

from gn_det.data.loader import TrainLoader, UnreadableSample, build_train_loader, seeded

RECORDS = [{"file_name": str(i), "width": 3 + i % 3, "height": 4} for i in range(10)]


def noisy(record: dict) -> dict:
    """A mapper that draws from every generator there is."""
    if record["file_name"] == "7":
        raise OSError("it is gone")
    return {**record, "drawn": (torch.rand(()).item(), np.random.rand())}


def loader(workers: int = 0, group: bool = True, first: int = 0) -> TrainLoader:
    made = TrainLoader(
        RECORDS,
        noisy,
        lambda records: TrainingSampler(len(records)),
        batch_size=2,
        group_by_shape=group,
        num_workers=workers,
    )
    made.start_at(11, first)
    return made


@pytest.mark.parametrize("group", [False, True])
def test_begun_at_a_batch_they_are_those_from_there_on(group):
    whole = list(islice(loader(group=group), 30))
    assert list(islice(loader(group=group, first=17), 13)) == whole[17:]
    assert list(islice(loader(2, group, first=17), 13)) == whole[17:], "two loading processes"


def test_the_order_is_detectron2_s():
    with seeded(11):
        sampler = TrainingSampler(len(RECORDS))
    expected = islice(AspectRatioGroupedDataset((RECORDS[i] for i in sampler), 2), 20)
    names = [
        [x.file_name if isinstance(x, UnreadableSample) else x["file_name"] for x in batch]
        for batch in islice(loader(), 20)
    ]
    assert names == [[record["file_name"] for record in batch] for batch in expected]


def test_nothing_else_is_drawn_otherwise_for_it():
    batches = iter(loader())
    next(batches)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(batches)
    assert torch.equal(torch.rand(3), expected)


def test_every_place_draws_for_itself():
    samples = [s for batch in islice(loader(), 30) for s in batch if isinstance(s, dict)]
    assert len({sample["drawn"] for sample in samples}) == len(samples) > 50


def test_what_cannot_be_read_is_told():
    batches = [sample for batch in islice(loader(), 30) for sample in batch]
    found = {sample for sample in batches if isinstance(sample, UnreadableSample)}
    assert found == {UnreadableSample("7", "it is gone")}


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_of_a_config(sampler):
    cfg = shapes_config(
        *("mask_rcnn_R_18_FPN_gn", "DATALOADER.SAMPLER_TRAIN", sampler),
        *("DATALOADER.REPEAT_THRESHOLD", 0.5),
    )
    found, again = build_train_loader(cfg), build_train_loader(cfg)
    found.start_at(3, 0)
    again.start_at(3, 4)
    batches = list(islice(found, 6))
    for one, two in zip(batches[4:], islice(again, 2), strict=True):
        assert [x["file_name"] for x in one] == [x["file_name"] for x in two]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(one, two, strict=True))
    theirs = next(iter(build_detection_train_loader(cfg)))
    assert [x.keys() for x in batches[0]] == [x.keys() for x in theirs]
