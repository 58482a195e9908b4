"""A training step that skips or refuses batches with unreadable images, Inf or NaN."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.loader import UnreadableSample, is_dead_loader, seed_from
from ..errors import InputError

# Begins the reason of a batch with Inf or NaN, unless its images cannot be read
DIVERGED = "the training has diverged, so lower SOLVER.BASE_LR, or the batch has bad values"
# Smallest loss scale; below it, float16 gradients were Inf or NaN at every scale
MIN_SCALE = 2.0**-14


class BadBatchError(InputError):
    """A batch with unreadable images, Inf or NaN."""


class TrainingEnd(Exception):  # noqa: N818
    """Raised by a hook in order to leave Detectron2's training loop."""


class TrainingStep(SimpleTrainer):
    """Detectron2's `SimpleTrainer` and `AMPTrainer` in one, with checks of each batch.

    A batch is bad if one of its images cannot be read, or if a loss or gradient is Inf or NaN. No
    process updates its weights with a batch that is bad in any process. The random state of the
    model depends only on the seed, the process and the iteration, so that resuming is exact.

    Args:
        model: maps a batch to a dict of losses, or to one loss.
        loader: yields lists of samples.
        optimizer: of the parameters of `model`.
        precision: data type of autocast, or None to disable it; float16 uses a `GradScaler`.
        skips: number of bad batches that are skipped with a warning; the next one raises.
        seed: 0 or larger, the same in all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Sequence[Any]],
        optimizer: Optimizer,
        precision: torch.dtype | None = None,
        skips: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, loader, optimizer)
        self.seed = seed
        self.skipped = 0
        self._skips = skips
        self._device = next(model.parameters()).device.type
        self._precision = precision
        self.grad_scaler = torch.amp.GradScaler(self._device, enabled=precision is torch.float16)
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]

    def run_step(self) -> None:
        """Train on one batch, or skip it if it is bad.

        Raises:
            InputError: if the system has no open files or memory left to read images.
            BadBatchError: for a bad batch after `skips` bad batches, and if float16 gradients are
                Inf or NaN at every loss scale.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        seed_from(self.seed, comm.get_rank(), self.iter)
        # The forward pass updates BN's running statistics before it is known that a batch is bad
        before = [buffer.clone() for buffer in self._statistics] if self._skips else []
        reason = describe_unreadable(batch)
        check_resources(batch)
        losses: dict[str, Tensor] = {}
        # All processes must agree before forward and backward, which synchronize them
        if not any_process(bool(reason)):
            reason, losses = self._forward(batch)
            if not any_process(bool(reason)):
                reason = self._backward(losses)
        if any_process(bool(reason)):
            for buffer, value in zip(self._statistics, before, strict=bool(before)):
                buffer.copy_(value)
            self._skip_batch(batch, reason)
            return
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() < MIN_SCALE:
            raise BadBatchError(
                f"iteration {self.iter}: float16 gradients are Inf or NaN at every loss scale; "
                "SOLVER.AMP.DTYPE bfloat16 has a wider range"
            )

    def _forward(self, batch: Sequence[Any]) -> tuple[str, dict[str, Tensor]]:
        """Compute the losses; return why that failed, or "", and the losses."""
        precision = self._precision
        try:
            with torch.autocast(self._device, precision, enabled=precision is not None):
                losses = self.model(batch)
        except FloatingPointError as error:  # raised by Detectron2's RPN for Inf or NaN
            return f"{DIVERGED}: {error}", {}
        return "", {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _backward(self, losses: dict[str, Tensor]) -> str:
        """Compute the gradients; return why they must not be used, or ""."""
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values(), torch.tensor(0.0))).backward()
        numbers = {name: loss.detach().float() for name, loss in losses.items()}
        # With float16, Inf gradients are normal now and then, and the scaler skips these steps
        if not self.grad_scaler.is_enabled():
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters if p.grad is not None]
            numbers["gradient norm"] = torch.nn.utils.get_total_norm(gradients)
        # A single transfer from the GPU
        values = torch.stack(list(numbers.values())).tolist()
        if all(map(math.isfinite, values)):
            return ""
        text = ", ".join(f"{k} {v:.4g}" for k, v in zip(numbers, values, strict=True))
        return f"{DIVERGED}: losses or gradients are Inf or NaN: {text}"

    def _skip_batch(self, batch: Sequence[Any], reason: str) -> None:
        """Log a bad batch as skipped, or raise an error if too many have been skipped."""
        self.optimizer.zero_grad()
        files = [getattr(x, "file_name", None) or x["file_name"] for x in batch]
        # The reasons of all processes with a bad batch
        gathered = comm.all_gather((reason, files))
        text = "; ".join(
            f"{why}, in the batch of {', '.join(names)}" for why, names in gathered if why
        )
        if self.skipped == self._skips:
            after = f" after {self.skipped} skipped batches" if self.skipped else ""
            raise BadBatchError(f"the batch of iteration {self.iter} is bad{after}: {text}")
        self.skipped += 1
        logging.getLogger(__name__).warning(
            f"Skipping the batch of iteration {self.iter}, {self.skipped} of at most "
            f"{self._skips}: {text}"
        )

    def state_dict(self) -> dict[str, Any]:
        own = {"seed": self.seed, "skipped": self.skipped}
        return super().state_dict() | own | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        self.skipped = state_dict.get("skipped", 0)
        if scaler := state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(scaler)


def describe_unreadable(batch: Sequence[Any]) -> str:
    """Describe the images of a batch that could not be read; "" if there are none."""
    samples = [sample for sample in batch if isinstance(sample, UnreadableSample)]
    text = "; ".join(f"{sample.file_name} ({sample.reason})" for sample in samples)
    return f"images cannot be read: {text}" if text else ""


def check_resources(batch: Sequence[Any]) -> None:
    """Raise an `InputError` if the system, not a file, is the reason for an unreadable sample."""
    for sample in batch:
        if isinstance(sample, UnreadableSample) and sample.fix:
            raise InputError(f"{sample.file_name}: {sample.reason}; {sample.fix}")


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process; all processes must call this."""
    return any(comm.all_gather(flag))


@contextmanager
def without_traceback() -> Iterator[None]:
    """Suppress the traceback that Detectron2 logs for errors that are reported in one sentence.

    The same for `TrainingEnd`, which is no error.
    """

    def wanted(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        expected = isinstance(error, InputError | OSError | TrainingEnd)
        return not (expected or is_dead_loader(error))

    logger = logging.getLogger("detectron2.engine.train_loop")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
