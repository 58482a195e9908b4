"""Gradient accumulation: the step of a large batch in the memory of a small one."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = Sequence[dict[str, Any]]
Losses = dict[str, Tensor]
# How many images, RoIs and foreground RoIs the losses of a part are averages over
Counts = tuple[float, float, float]


def accumulate_gradients(model: nn.Module, parts: int) -> None:
    """Make `model` take each training batch in `parts` parts, one after the other.

    Forward keeps nothing of a part but its losses. Backward runs the parts again, one by one, and
    adds up their gradients: the memory of one part, for the time of one more forward pass.

    The losses of all parts are known before backward starts, so they can be averaged as Detectron2
    averages those of one batch: the box head's over all RoIs, the mask head's over all foreground
    RoIs, the others over images. And the images of a part are padded to the size of the batch, for
    GN's statistics see the padding. So with GN and BN* the gradients are those of the batch in one
    piece, given the same sampled RoIs. BN's and SyncBN's statistics are those of a part.

    The parameters and their names, and the model's behaviour outside training, stay as they are.

    Args:
        model: takes a list of Detectron2's image records, and returns a dict of losses.
        parts: how many, of equal size; the length of every batch must be a multiple.
    """
    runner = _PartByPart(model, parts)
    if isinstance(backbone := getattr(model, "backbone", None), nn.Module):
        backbone.register_forward_pre_hook(runner.pad)
    model.forward = runner.forward


class _PartByPart:
    """The forward pass of a model in parts."""

    def __init__(self, model: nn.Module, parts: int) -> None:
        self._model = model
        self._forward = model.forward
        self._parts = parts
        self._padded = (0, 0)

    def forward(self, batch: Batch) -> Any:
        """The losses of `batch` in training, else whatever the model itself returns."""
        if not self._model.training:
            return self._forward(batch)
        self._padded = self._padded_size(batch)
        size = len(batch) // self._parts
        results = [self._run(batch[i : i + size]) for i in range(0, len(batch), size)]
        return _average([losses for losses, _ in results], [counts for _, counts in results])

    def pad(self, backbone: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        """Pad images (N, C, H, W) with zeros below and on the right, as Detectron2 does."""
        (images,) = inputs
        if not self._model.training:
            return None
        height, width = (
            max(a - b, 0) for a, b in zip(self._padded, images.shape[-2:], strict=True)
        )
        return F.pad(images, (0, width, 0, height))

    def _padded_size(self, batch: Batch) -> tuple[int, int]:
        """Height and width in pixels that Detectron2 pads the images of a batch to."""
        backbone = getattr(self._model, "backbone", None)
        stride = max(getattr(backbone, "size_divisibility", 1), 1)
        height, width = (max(r["image"].shape[axis] for r in batch) for axis in (-2, -1))
        return -(-height // stride) * stride, -(-width // stride) * stride

    def _run(self, part: Batch) -> tuple[Losses, Counts]:
        storage = get_event_storage()
        losses = checkpoint(
            lambda batch, _: self._forward(batch),
            part,
            # For `checkpoint` to find the device whose random state it has to bring back
            next(self._model.parameters()),
            use_reentrant=False,
            # The metrics are written once, and on a GPU backward runs in a thread of its own
            context_fn=lambda: (nullcontext(), EventStorage(storage.iter)),
        )
        latest = storage.latest()
        foreground, background = (
            len(part) * latest.get(f"roi_head/num_{kind}_samples", (0.0, 0))[0]
            for kind in ("fg", "bg")
        )
        return losses, (len(part), foreground + background, foreground)


def _average(losses: Sequence[Losses], counts: Sequence[Counts]) -> Losses:
    """Averages over the whole batch from those over its parts."""
    images, rois, foreground = ([count[i] for count in counts] for i in range(3))

    def weights(name: str) -> list[float]:
        of = images
        if name.startswith("loss_mask"):
            of = foreground
        elif name.startswith(("loss_cls", "loss_box_reg")):
            of = rois
        if not sum(of):  # no RoIs in all of the batch, or a model without RoIs
            of = images
        return [n / sum(of) for n in of]

    return {
        name: sum(w * part[name] for w, part in zip(weights(name), losses, strict=True))  # type: ignore[misc]
        for name in losses[0]
    }
