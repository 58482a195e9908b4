"""A training data loader that can resume at any batch with bit-identical data."""

import pickle
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
from ..processes import end_with_parent
from .image_reader import READ_ERRORS
from .worker_limits import EXHAUSTED, can_share_batches, usable_workers

# (index of a record, position of the sample in the order)
Place = tuple[int, int]
# Seconds that a worker process stays alive after SIGTERM
GRACE = 60


@dataclass(frozen=True)
class UnreadableSample:
    """A placeholder in a batch for a sample that could not be loaded."""

    file_name: str
    reason: str
    # What to do if the system, not the file, is at fault
    fix: str = ""


class TrainLoader:
    """A training data loader like Detectron2's, which can start at any batch.

    The order depends on the seed only. The mapper's random numbers depend on the seed, the process
    rank and the sample's position in the order. The number of workers therefore has no effect.

    Args:
        records: Detectron2's dataset dicts, or other inputs of the mapper.
        mapper: maps a record to a sample.
        make_sampler: maps the records to an infinite sampler of indices, which must be seeded from
            NumPy's global generator.
        batch_size: batch size of this process.
        group_by_shape: whether to put wide and tall images into separate batches.
        num_workers: number of worker processes; 0 loads in the main process.
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
        # Serialized in one array, which worker processes share instead of copying it
        self._records = DatasetFromList(list(records), copy=False)
        self._mapper, self._make_sampler = mapper, make_sampler
        self._batch_size, self._num_workers = batch_size, num_workers
        self._seed: int | None = None
        self._first = 0

    def start_at(self, seed: int, batch: int) -> None:
        """Set the seed and the first batch; to be called before iteration starts.

        Args:
            seed: the seed, equal in all processes.
            batch: number of batches to skip, without loading them.
        """
        self._seed, self._first = seed, batch

    def __iter__(self) -> Iterator[list[Any]]:
        """Endless batches, as lists of samples or `UnreadableSample`s."""
        # A generator, so that `start_at` still has an effect until the first batch is requested
        seed = comm.shared_random_seed() if self._seed is None else self._seed
        with seeded(seed):
            sampler = self._make_sampler(self._records)
        workers = usable_workers(self._num_workers)
        packed = workers > 0 and not can_share_batches()
        batches = DataLoader(
            _MappedRecords(self._records, self._mapper, (seed, comm.get_rank())),
            batch_sampler=_PlacedBatches(sampler, self._batch_size, self._wide, self._first),
            num_workers=workers,
            collate_fn=_pack if packed else list,
            worker_init_fn=_start_worker,
        )
        for batch in batches:
            yield pickle.loads(batch) if packed else batch


def _pack(batch: Sequence[Any]) -> bytes:
    """A batch as bytes, which a worker passes on without shared memory."""
    return pickle.dumps(list(batch), pickle.HIGHEST_PROTOCOL)


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], Any] | None = None) -> TrainLoader:
    """Build a `TrainLoader` with the records, filter, mapper and sampler that `cfg` selects.

    Args:
        cfg: a Detectron2 config.
        mapper: replaces Detectron2's `DatasetMapper`.
    """
    from_config = build_detection_train_loader.from_config
    parts = from_config(cfg, mapper=mapper, sampler=())
    return TrainLoader(
        parts["dataset"],
        parts["mapper"],
        lambda records: from_config(cfg, mapper=parts["mapper"], dataset=records)["sampler"],
        batch_size=parts["total_batch_size"] // comm.get_world_size(),
        group_by_shape=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
    )


def _start_worker(worker: int) -> None:
    """Let a worker process end with its training process, and not earlier.

    It stays alive for `GRACE` seconds after SIGTERM, and ignores Ctrl-C: signals often reach all
    processes of a group or job at once, and the training process still needs its workers to finish
    the iteration.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    end_with_parent()


class _MappedRecords(Dataset):
    """A dataset of mapped records, whose random numbers depend on the seed and the position."""

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
            reason = printable(str(error) or type(error).__name__)
            fix = EXHAUSTED.get(error.errno or 0, "") if isinstance(error, OSError) else ""
            return UnreadableSample(printable(name, 1000), reason, fix)


class _PlacedBatches(Sampler):
    """A batch sampler in the order of another sampler, starting at batch `first`.

    With `wide`, the batches are those of Detectron2's `AspectRatioGroupedDataset`.
    """

    def __init__(
        self, sampler: Iterable[int], size: int, wide: Sequence[bool] | None, first: int
    ) -> None:
        self._sampler, self._size, self._wide, self._first = sampler, size, wide, first

    def __iter__(self) -> Iterator[list[Place]]:
        return islice(self._all(), self._first, None)

    def _all(self) -> Iterator[list[Place]]:
        batches: dict[bool, list[Place]] = {False: [], True: []}
        for number, index in enumerate(self._sampler):
            batch = batches[self._wide[index] if self._wide else False]
            batch.append((index, number))
            if len(batch) == self._size:
                yield batch[:]
                batch.clear()


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch inside the block, and restore their CPU generators after it.

    Args:
        numbers: non-negative integers, which determine the seed together.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_from(*numbers)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_from(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, including those of GPUs.

    Args:
        numbers: non-negative integers, which determine the seed together.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def is_dead_loader(error: BaseException | None) -> bool:
    """Whether an error means that a worker process of the data loader has died."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
