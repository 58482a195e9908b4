"""Faults inside the training process: each function takes a trainer class and modifies it."""

import contextlib
import io
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetMapper

from gn_det.checkpoint import checkpointer
from gn_det.data.loader import build_train_loader
from gn_det.engine.trainer import Trainer


def killed_in_step(trainer: type[Trainer], iteration: int, number: int) -> type[Trainer]:
    """Send a signal to the process in an iteration."""

    class Faulty(trainer):  # type: ignore[valid-type,misc]
        def run_step(self) -> None:
            if self.iter == iteration:
                os.kill(os.getpid(), number)
            super().run_step()

    return Faulty


def killed_in_save(trainer: type[Trainer], count: int, share: float) -> type[Trainer]:
    """Kill the process when a fraction of the count-th checkpoint has been written."""

    def save(content: Any, file: io.IOBase) -> None:
        nonlocal count
        count -= 1
        buffer = io.BytesIO()
        torch_save(content, buffer)
        if count:
            file.write(buffer.getvalue())
            return
        file.write(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch_save = torch.save
    torch.save = save
    return trainer


def killed_before_tag(trainer: type[Trainer], count: int) -> type[Trainer]:
    """Kill the process between the count-th checkpoint and `last_checkpoint`."""

    def tag(self: Any, name: str) -> None:
        nonlocal count
        count -= 1
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)
        old(self, name)

    old = checkpointer.StrictCheckpointer.tag_last_checkpoint
    checkpointer.StrictCheckpointer.tag_last_checkpoint = tag  # type: ignore[method-assign]
    return trainer


def disk_full(trainer: type[Trainer], iteration: int, size: int) -> type[Trainer]:
    """Limit the size of files, starting after an iteration."""

    class Faulty(trainer):  # type: ignore[valid-type,misc]
        def run_step(self) -> None:
            super().run_step()
            if self.iter == iteration:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return Faulty


def disk_gone(trainer: type[Trainer], iteration: int, code: int) -> type[Trainer]:
    """Let opening a checkpoint for writing fail, starting after an iteration."""

    @contextlib.contextmanager
    def write_whole(path: Path, mode: str = "w") -> Iterator[None]:
        raise OSError(code, os.strerror(code), str(path))
        yield

    class Faulty(trainer):  # type: ignore[valid-type,misc]
        def run_step(self) -> None:
            super().run_step()
            if self.iter == iteration:
                checkpointer.write_whole = write_whole

    return Faulty


def loader_killed(trainer: type[Trainer], iteration: int) -> type[Trainer]:
    """Kill a worker process of the data loader after an iteration."""

    class Faulty(trainer):  # type: ignore[valid-type,misc]
        def run_step(self) -> None:
            super().run_step()
            if self.iter == iteration:
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)

    return Faulty


class SpoiledMapper(DatasetMapper):
    """Detectron2's mapper, but 10% of the images consist of NaN."""

    def __call__(self, record: dict) -> dict:
        sample = super().__call__(record)
        if torch.rand(()) < 0.1:
            sample["image"] = torch.full(sample["image"].shape, float("nan"))
        return sample


def not_a_number(trainer: type[Trainer]) -> type[Trainer]:
    """Let random images consist of NaN."""

    class Faulty(trainer):  # type: ignore[valid-type,misc]
        @classmethod
        def build_train_loader(cls, cfg):
            return build_train_loader(cfg, SpoiledMapper(cfg, True))

    return Faulty
