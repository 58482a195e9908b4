"""Gradient accumulation: the step of a large batch with the memory of a small one."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = Sequence[dict[str, Any]]
Losses = dict[str, Tensor]
# Numbers of images, RoIs and foreground RoIs that the losses of a part are averaged over
Counts = tuple[float, float, float]


def accumulate_gradients(model: nn.Module, parts: int) -> None:
    """Make `model` process each training batch in `parts` parts, one after the other.

    The forward pass keeps only the losses of a part. The backward pass recomputes the parts one by
    one and accumulates their gradients. This needs the memory of one part, and the time of one more
    forward pass.

    The losses of all parts are known before the backward pass starts. So they can be averaged as
    Detectron2 does for one batch: those of the box head over all RoIs, those of the mask head over
    all foreground RoIs, the others over images. The images of a part are padded to the size of the
    batch, since the statistics of GN include the padding. So with GN and frozen BN the gradients
    equal those of the undivided batch, given the same sampled RoIs. BN and SyncBN compute their
    statistics on one part.

    Parameters, their names, and inference do not change.

    Args:
        model: changed in place; in training it maps a list of Detectron2's dataset dicts to a dict
            of losses.
        parts: number of parts of equal size; the length of every batch must be a multiple of it.
    """
    runner = _PartByPart(model, parts)
    if isinstance(backbone := getattr(model, "backbone", None), nn.Module):
        backbone.register_forward_pre_hook(runner.pad)
    model.forward = runner.forward


class _PartByPart:
    """Runs the forward pass of a model in parts."""

    def __init__(self, model: nn.Module, parts: int) -> None:
        self._model = model
        self._forward = model.forward
        self._parts = parts
        self._padded = (0, 0)

    def forward(self, batch: Batch) -> Any:
        """Return the losses of `batch` in training, else the outputs of the model."""
        if not self._model.training:
            return self._forward(batch)
        self._padded = self._padded_size(batch)
        size = len(batch) // self._parts
        results = [self._run(batch[i : i + size]) for i in range(0, len(batch), size)]
        return _average([losses for losses, _ in results], [counts for _, counts in results])

    def pad(self, backbone: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        """Pad images (N, C, H, W) with zeros at the bottom and right, as Detectron2 does."""
        (images,) = inputs
        if not self._model.training:
            return None
        height, width = (
            max(a - b, 0) for a, b in zip(self._padded, images.shape[-2:], strict=True)
        )
        return F.pad(images, (0, width, 0, height))

    def _padded_size(self, batch: Batch) -> tuple[int, int]:
        """Height and width, in pixels, to which Detectron2 pads the images of a batch."""
        backbone = getattr(self._model, "backbone", None)
        stride = max(getattr(backbone, "size_divisibility", 1), 1)
        height, width = (max(r["image"].shape[axis] for r in batch) for axis in (-2, -1))
        return -(-height // stride) * stride, -(-width // stride) * stride

    def _run(self, part: Batch) -> tuple[Losses, Counts]:
        """Compute the losses of a part, and what they are averaged over."""
        storage = get_event_storage()
        losses = checkpoint(
            lambda batch, _: self._forward(batch),
            part,
            # `checkpoint` restores the random state of the device that it finds in its arguments
            next(self._model.parameters()),
            use_reentrant=False,
            # Recomputation must not log metrics again; on a GPU, it runs in another thread, which
            # has no event storage
            context_fn=lambda: (nullcontext(), EventStorage(storage.iter)),
        )
        latest = storage.latest()
        foreground, background = (
            len(part) * latest.get(f"roi_head/num_{kind}_samples", (0.0, 0))[0]
            for kind in ("fg", "bg")
        )
        return losses, (len(part), foreground + background, foreground)


def _average(losses: Sequence[Losses], counts: Sequence[Counts]) -> Losses:
    """Combine the averages over the parts into averages over the batch."""
    images, rois, foreground = ([count[i] for count in counts] for i in range(3))

    def weights(name: str) -> list[float]:
        count = images
        if name.startswith("loss_mask"):
            count = foreground
        elif name.startswith(("loss_cls", "loss_box_reg")):
            count = rois
        if not sum(count):  # a batch without RoIs, or a model without RoI heads
            count = images
        return [n / sum(count) for n in count]

    return {
        name: sum(w * part[name] for w, part in zip(weights(name), losses, strict=True))  # type: ignore[misc]
        for name in losses[0]
    }
