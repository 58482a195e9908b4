"""Detectron2's checkpointer with strict loading and safe saving."""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.logger import log_first_n
from torch import nn

from ..errors import InputError
from ..files import write_whole
from ..modeling.i3d import inflate_weights
from ..modeling.parts import weight_names
from .load import Loaded
from .names import norm_of
from .read import READ_ERRORS, is_tensor, read_content
from .save import save_content

# The model with the best metric
BEST = "model_best.pth"
# Endings of names in Caffe2 and pycls files that are not weights
NO_WEIGHTS = ("_momentum", "num_batches_tracked")


class StrictCheckpointer(DetectionCheckpointer):
    """A `DetectionCheckpointer` that rejects weights which do not match the model.

    After loading it logs how many tensors were loaded, initialised or not used. A checkpoint is
    written completely before `last_checkpoint` names it. If that checkpoint is missing or damaged,
    training resumes from the newest intact one, with a warning. Loading never runs code from a
    file.

    Args:
        model: the model to load into or save.
        save_dir: folder of the checkpoints, `OUTPUT_DIR` in training.
        complete: whether the file must contain every tensor of the model, as for evaluation.
            Resuming always requires this.
        keep: number of periodic checkpoints to keep, the newest ones; 0 keeps all.
        **kwargs: as for `DetectionCheckpointer`.

    Raises:
        InputError: on loading, if the file does not match the model or cannot be read.
        OSError: on saving, if the disk fails or is full. Earlier files stay intact.
    """

    # Result of the last `load`
    loaded: Loaded | None = None

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        complete: bool = False,
        keep: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        self._complete, self._keep = complete, keep
        self._path = ""

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        content = {key: part.state_dict() for key, part in self.checkpointables.items()}
        content |= {"model": self.model.state_dict(), **kwargs}
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with write_whole(path, "wb") as file:
            save_content(content, file)
        self.tag_last_checkpoint(path.name)
        self._tidy(path)

    def save_best(self, iteration: int) -> None:
        """Save the weights as `BEST`, from which no training resumes.

        Args:
            iteration: the last one that the weights were trained for.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir, BEST)
        self.logger.info(f"Saving the best model so far to {path}")
        with write_whole(path, "wb") as file:
            save_content({"model": self.model.state_dict(), "iteration": iteration}, file)

    def _tidy(self, newest: Path) -> None:
        """Remove old checkpoints."""
        periodic = sorted(newest.parent.glob(f"model_{'[0-9]' * 7}.pth"))
        if self._keep and newest in periodic:
            # Checkpoints of later iterations belong to another training run, or are damaged
            candidates = periodic[: periodic.index(newest) + 1]
            for path in candidates[: -self._keep]:
                path.unlink()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with write_whole(Path(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Path of the checkpoint to resume from, "" if there is none."""
        folder = Path(self.save_dir)
        tag = folder / "last_checkpoint"
        # After a disk failure this file may contain anything
        named = tag.read_bytes().decode(errors="replace").strip() if tag.is_file() else ""
        named = named if named.isprintable() else ""
        if named and is_intact(folder / named):
            return str(folder / named)
        others = [p for p in folder.glob("model_*.pth") if p.name not in (named, BEST)]
        intact = sorted((iteration_of(path), path) for path in others if is_intact(path))
        newest = str(intact[-1][1]) if intact and intact[-1][0] >= 0 else ""
        if newest or tag.is_file():
            fault = f"{folder / named} is missing or damaged" if named else f"{tag} names no file"
            action = f"resuming from {newest}" if newest else f"{folder} has no intact checkpoint"
            log_first_n(logging.WARNING, f"{fault}: {action}", key="message", name=__name__)
        return newest

    def load(self, path: str, checkpointables: list[str] | None = None, **kwargs: Any) -> Any:
        self._path, complete = path, self._complete
        self._complete = complete or checkpointables is None
        try:
            return super().load(path, checkpointables, **kwargs)
        finally:
            self._complete = complete
            # Detectron2's main branch resets this only after a successful load
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        path = Path(filename)
        content = read_content(path)
        entries = dict(content) if isinstance(content, Mapping) else {}
        # As in `DetectionCheckpointer`: these suffixes stand for Caffe2's and pycls' tensor names
        author, key = {".pkl": ("Caffe2", "blobs"), ".pyth": ("pycls", "model_state")}.get(
            path.suffix, ("", "model")
        )
        if author and not {"model", "__author__"} <= entries.keys():
            tensors = entries.get(key, entries)
            loaded = {"__author__": author, "matching_heuristics": True, "model": tensors}
        else:
            loaded = entries if "model" in entries else {"model": entries}
        if not isinstance(loaded["model"], Mapping) or not loaded["model"]:
            raise InputError(f"{path} cannot be read as weights: it has no named tensors")
        if author:
            kept = {k: v for k, v in loaded["model"].items() if not str(k).endswith(NO_WEIGHTS)}
            loaded["model"] = kept
        if wrong := [name for name, value in loaded["model"].items() if not is_tensor(value)]:
            raise InputError(f"{path} cannot be read as weights: {wrong[0]} is not a tensor")
        # On Detectron2's main branch, MODEL.WEIGHTS may end with ?matching_heuristics=True
        url = getattr(self, "_parsed_url_during_load", None)
        if url is not None and "matching_heuristics=True" in url.query:
            loaded["matching_heuristics"] = True
        return loaded

    def _load_model(self, checkpoint: Any) -> None:
        norm = norm_of(checkpoint["model"])
        inflate_weights(checkpoint["model"], self.model)
        result = super()._load_model(checkpoint)
        model = weight_names(self.model)
        misshapen = {name for name, *_ in result.incorrect_shapes}
        fresh = {*result.missing_keys, *misshapen} & {*model}
        lost: set[str] = set()
        if checkpoint.get("matching_heuristics"):
            # When Detectron2 matches names by suffix, misshapen tensors are reported as unexpected
            lost = {n for n in result.unexpected_keys if any(f.endswith(f".{n}") for f in fresh)}
        misshapen |= {f for f in fresh if any(f.endswith(f".{n}") for n in lost)}
        unused = {*result.unexpected_keys} - lost
        self.loaded = Loaded(model, fresh, misshapen, unused, norm)
        logging.getLogger(__name__).info(f"Weights of {self._path}\n{self.loaded.summary()}")
        if reason := self.loaded.mismatch(self._complete):
            fix = "" if self._complete else self.loaded.fix(self._path)
            raise InputError(f"MODEL.WEIGHTS {self._path}: {reason}{fix}")


def is_intact(path: Path) -> bool:
    """Whether a checkpoint exists, its checksums are correct, and it can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            # First the reader, which refuses archives that expand without bound
            return "model" in read_content(path, "meta") and archive.testzip() is None
    except READ_ERRORS:
        return False


def iteration_of(path: Path) -> int:
    """The iteration at which a checkpoint was saved; -1 if the file does not record it."""
    try:
        content = read_content(path, "meta")
    except InputError:
        return -1
    iteration = content.get("iteration") if isinstance(content, Mapping) else None
    return iteration if type(iteration) is int else -1
