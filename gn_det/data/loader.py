"""A loader of training batches that can be gone on with at any batch, bit by bit."""

import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import printable
from .image_reader import READ_ERRORS

# (index of a record, how many samples came before it)
Place = tuple[int, int]
# Seconds that a loading process has left once it was told to end
GRACE = 60


@dataclass(frozen=True)
class UnreadableSample:
    """What stands in a batch for a sample that could not be loaded."""

    file_name: str
    why: str


class TrainLoader:
    """Batches of samples, as Detectron2's training loader gives them, wherever they are begun.

    The order follows from the seed, and what the mapper draws at random from the seed and the
    sample's place in that order, so the number of loading processes changes nothing.

    Args:
        records: Detectron2's dataset dicts, or what else the mapper takes.
        mapper: from a record to a sample.
        make_sampler: from the records to a sampler of indices without an end, which is seeded from
            NumPy's generator.
        batch_size: samples of this process in a batch.
        group_by_shape: whether wide and high pictures come into batches of their own.
        num_workers: processes that load; 0 to load in this one.
    """

    def __init__(
        self,
        records: Sequence[Any],
        mapper: Callable[[Any], Any],
        make_sampler: Callable[[Any], Iterable[int]],
        *,
        batch_size: int,
        group_by_shape: bool,
        num_workers: int,
    ) -> None:
        self._wide = [r["width"] > r["height"] for r in records] if group_by_shape else None
        # Shared by the loading processes, rather than copied into each
        self._records = DatasetFromList(list(records), copy=False)
        self._mapper, self._make_sampler = mapper, make_sampler
        self._batch_size, self._num_workers = batch_size, num_workers
        self._seed: int | None = None
        self._first = 0

    def start_at(self, seed: int, batch: int) -> None:
        """Begin with a batch of the order that follows from a seed, the same in all processes.

        Those before it are not loaded. To be called before iteration begins.
        """
        self._seed, self._first = seed, batch

    def __iter__(self) -> Iterator[list[Any]]:
        """Lists of samples without an end, some of them `UnreadableSample`."""
        # A generator, so that nothing is decided before the first batch is asked for
        seed = comm.shared_random_seed() if self._seed is None else self._seed
        with seeded(seed):
            sampler = self._make_sampler(self._records)
        yield from DataLoader(
            _MappedRecords(self._records, self._mapper, (seed, comm.get_rank())),
            batch_sampler=_PlacedBatches(sampler, self._batch_size, self._wide, self._first),
            num_workers=self._num_workers,
            collate_fn=list,
            worker_init_fn=_outlive_signals,
        )


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], Any] | None = None) -> TrainLoader:
    """The loader that `cfg` asks Detectron2 for: its records, filter, mapper and sampler.

    Args:
        mapper: in the place of Detectron2's `DatasetMapper`.
    """
    choose = build_detection_train_loader.from_config
    parts = choose(cfg, mapper=mapper, sampler=())
    return TrainLoader(
        parts["dataset"],
        parts["mapper"],
        lambda records: choose(cfg, mapper=parts["mapper"], dataset=records)["sampler"],
        batch_size=parts["total_batch_size"] // comm.get_world_size(),
        group_by_shape=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
    )


def _outlive_signals(worker: int) -> None:
    """Let a loading process go on for a while, so that the training can finish its iteration.

    Signals are often given to all processes of a group or job at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


class _MappedRecords(Dataset):
    """Records as a mapper makes samples of them, each at a place of its own."""

    def __init__(
        self, records: Dataset, mapper: Callable[[Any], Any], seed: tuple[int, ...]
    ) -> None:
        self._records, self._mapper, self._seed = records, mapper, seed

    def __getitem__(self, place: Place) -> Any:
        index, number = place
        record = self._records[index]
        try:
            with seeded(*self._seed, number):
                return self._mapper(record)
        except READ_ERRORS as error:
            name = record["file_name"] if isinstance(record, dict) else record[0]
            why = printable(str(error) or type(error).__name__)
            return UnreadableSample(printable(name, 1000), why)


class _PlacedBatches(Sampler):
    """Batches of places, in the order of a sampler, from one of them on."""

    def __init__(
        self, sampler: Iterable[int], size: int, wide: Sequence[bool] | None, first: int
    ) -> None:
        self._sampler, self._size, self._wide, self._first = sampler, size, wide, first

    def __iter__(self) -> Iterator[list[Place]]:
        return islice(self._all(), self._first, None)

    def _all(self) -> Iterator[list[Place]]:
        waiting: dict[bool, list[Place]] = {False: [], True: []}
        for number, index in enumerate(self._sampler):
            batch = waiting[self._wide[index] if self._wide else False]
            batch.append((index, number))
            if len(batch) == self._size:
                yield batch[:]
                batch.clear()


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Let Python's, NumPy's and the CPU's PyTorch generator follow from numbers, for a while."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_from(*numbers)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_from(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, those of GPUs too, from all numbers.

    Args:
        numbers: not negative.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
