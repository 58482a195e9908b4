"""One step of training, which never lets the weights see numbers or pictures that are no good."""

import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.loader import UnreadableSample, seed_from
from ..errors import InputError

# Below it, float16's gradients have been infinite or NaN at every scale
MIN_SCALE = 2.0**-14


class BadBatchError(InputError):
    """A batch that cannot be trained on."""


class TrainingStep(SimpleTrainer):
    """Detectron2's step, in mixed precision too, without its blindness to what it trains on.

    What the model draws at random follows from the seed, the process and the iteration. A batch is
    bad if a picture of it cannot be read, or if a loss or gradient is infinite or NaN; the weights
    never see it, in no process.

    Args:
        loader: gives lists of samples.
        precision: what autocast computes in, None for no autocast; float16 with a `GradScaler`.
        skips: bad batches to pass over, with a warning for each, before one stops the training.
        seed: not negative, the same in all processes.
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
        """Train on one batch, or pass over it.

        Raises:
            BadBatchError: for a bad batch, once no more may be passed over.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        seed_from(self.seed, comm.get_rank(), self.iter)
        # BN's running statistics see a batch before anybody knows whether it is a good one
        before = [buffer.clone() for buffer in self._statistics] if self._skips else []
        why = unreadable(batch)
        losses: dict[str, Tensor] = {}
        # Asked before each part in which processes wait for each other
        if not anywhere(bool(why)):
            why, losses = self._forward(batch)
            if not anywhere(bool(why)):
                why = self._backward(losses)
        if anywhere(bool(why)):
            for buffer, value in zip(self._statistics, before, strict=bool(before)):
                buffer.copy_(value)
            self._pass_over(batch, why)
            return
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() < MIN_SCALE:
            raise BadBatchError(
                f"iteration {self.iter}: gradients are infinite or NaN in float16, however the "
                "loss is scaled; SOLVER.AMP.DTYPE bfloat16 has a wider range"
            )

    def _forward(self, batch: Sequence[Any]) -> tuple[str, dict[str, Tensor]]:
        """Why there are no losses, else "", and the losses."""
        precision = self._precision
        try:
            with torch.autocast(self._device, precision, enabled=precision is not None):
                losses = self.model(batch)
        except FloatingPointError as error:  # Detectron2's, from within its proposals
            return str(error), {}
        return "", {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _backward(self, losses: dict[str, Tensor]) -> str:
        """Set the gradients; why they must not be followed, else ""."""
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values(), torch.tensor(0.0))).backward()
        numbers = {name: loss.detach().float() for name, loss in losses.items()}
        # In float16 they are infinite now and then, and the scaler passes over such steps
        if not self.grad_scaler.is_enabled():
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters if p.grad is not None]
            numbers["norm of the gradient"] = torch.nn.utils.get_total_norm(gradients)
        # One transfer from the GPU for all of them
        values = torch.stack(list(numbers.values())).tolist()
        if all(map(math.isfinite, values)):
            return ""
        told = ", ".join(f"{k} {v:.4g}" for k, v in zip(numbers, values, strict=True))
        return f"there are infinite numbers or NaN: {told}"

    def _pass_over(self, batch: Sequence[Any], why: str) -> None:
        self.optimizer.zero_grad()
        files = [getattr(x, "file_name", None) or x["file_name"] for x in batch]
        told = "; ".join(
            f"{why}, with {', '.join(files)}" for why, files in comm.all_gather((why, files)) if why
        )
        if self.skipped == self._skips:
            passed = f" after {self.skipped} that were passed over" if self.skipped else ""
            raise BadBatchError(f"the batch of iteration {self.iter} is bad{passed}: {told}")
        self.skipped += 1
        logging.getLogger(__name__).warning(
            f"Passing over the batch of iteration {self.iter}, {self.skipped} of at most "
            f"{self._skips}: {told}"
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


def unreadable(batch: Sequence[Any]) -> str:
    """Which pictures of a batch could not be read, and why; "" if all were."""
    samples = [sample for sample in batch if isinstance(sample, UnreadableSample)]
    told = "; ".join(f"{sample.file_name} ({sample.why})" for sample in samples)
    return f"there are pictures that cannot be read: {told}" if told else ""


def anywhere(flag: bool) -> bool:
    """Whether a flag is set in any process of the training."""
    return any(comm.all_gather(flag))
