"""Detectron2's checkpointer, made strict in what it loads and safe in what it saves."""

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
from ..modeling.parts import weight_names
from .load import Loaded
from .names import norm_of
from .read import BROKEN, is_tensor, read_content
from .save import save_content

# Ends of names of what stands beside the weights in such files
NO_WEIGHTS = ("_momentum", "num_batches_tracked")


class StrictCheckpointer(DetectionCheckpointer):
    """Detectron2's, which says in one block what it loaded, and refuses what does not fit.

    A checkpoint is on the disk whole before `last_checkpoint` names it. On resuming, a checkpoint
    that is missing or damaged is passed over for the newest whole one, with a warning. Nothing that
    a file brings along is run.

    Args:
        whole: whether the file has to fill all of the model, as for evaluation. Always so when
            training goes on from a checkpoint of its own.
        keep: how many of the checkpoints of a running training stay, the newest; 0 for all.

    Raises:
        InputError: on loading a file that the model does not fit, or that is no checkpoint.
        OSError: on saving, by a disk that is full or gone; what was there before stays.
    """

    loaded: Loaded | None = None

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        whole: bool = False,
        keep: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        self._whole, self._keep = whole, keep
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

    def _tidy(self, newest: Path) -> None:
        """Remove checkpoints that are not to be kept, and what a killed process left half."""
        for partial in newest.parent.glob("*.pth.partial"):
            partial.unlink()
        running = sorted(newest.parent.glob(f"model_{'[0-9]' * 7}.pth"))
        if self._keep and newest in running:
            # Those of later iterations are of another training, or damaged
            older = running[: running.index(newest) + 1]
            for path in older[: -self._keep]:
                path.unlink()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with write_whole(Path(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The checkpoint to go on from, "" if there is none."""
        folder = Path(self.save_dir)
        tag = folder / "last_checkpoint"
        # Whatever it holds: a disk that failed may have left anything
        named = tag.read_bytes().decode(errors="replace").strip() if tag.is_file() else ""
        named = named if named.isprintable() else ""
        if named and is_whole(folder / named):
            return str(folder / named)
        others = [path for path in folder.glob("model_*.pth") if path.name != named]
        whole = sorted((iteration_of(path), path) for path in others if is_whole(path))
        found = str(whole[-1][1]) if whole and whole[-1][0] >= 0 else ""
        if found or tag.is_file():
            passed = f"{folder / named} is missing or damaged" if named else f"{tag} names no file"
            instead = (
                f"going on from {found}" if found else "there is no whole checkpoint beside it"
            )
            log_first_n(logging.WARNING, f"{passed}: {instead}", key="message", name=__name__)
        return found

    def load(self, path: str, checkpointables: list[str] | None = None, **kwargs: Any) -> Any:
        self._path, whole = path, self._whole
        self._whole = whole or checkpointables is None
        try:
            return super().load(path, checkpointables, **kwargs)
        finally:
            self._whole = whole
            # Detectron2's main does so only after files that it could load
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        path = Path(filename)
        content = read_content(path)
        found = dict(content) if isinstance(content, Mapping) else {}
        # What Detectron2 makes of the files of others, who have other names for tensors
        author, nest = {".pkl": ("Caffe2", "blobs"), ".pyth": ("pycls", "model_state")}.get(
            path.suffix, ("", "model")
        )
        if author and not {"model", "__author__"} <= found.keys():
            tensors = found.get(nest, found)
            loaded = {"__author__": author, "matching_heuristics": True, "model": tensors}
        else:
            loaded = found if "model" in found else {"model": found}
        if not isinstance(loaded["model"], Mapping) or not loaded["model"]:
            raise InputError(f"{path} cannot be read as weights: it holds no tensors by name")
        if author:
            kept = {k: v for k, v in loaded["model"].items() if not str(k).endswith(NO_WEIGHTS)}
            loaded["model"] = kept
        if wrong := [name for name, value in loaded["model"].items() if not is_tensor(value)]:
            raise InputError(f"{path} cannot be read as weights: {wrong[0]} is no tensor")
        # On Detectron2's main, MODEL.WEIGHTS may end with ?matching_heuristics=True
        url = getattr(self, "_parsed_url_during_load", None)
        if url is not None and "matching_heuristics=True" in url.query:
            loaded["matching_heuristics"] = True
        return loaded

    def _load_model(self, checkpoint: Any) -> None:
        norm = norm_of(checkpoint["model"])
        found = super()._load_model(checkpoint)
        model = weight_names(self.model)
        misshapen = {name for name, *_ in found.incorrect_shapes}
        fresh = {*found.missing_keys, *misshapen} & {*model}
        lost: set[str] = set()
        if checkpoint.get("matching_heuristics"):
            # Where names are matched by their endings, Detectron2 drops what has another shape
            lost = {n for n in found.unexpected_keys if any(f.endswith(f".{n}") for f in fresh)}
        misshapen |= {f for f in fresh if any(f.endswith(f".{n}") for n in lost)}
        unused = {*found.unexpected_keys} - lost
        self.loaded = Loaded(model, fresh, misshapen, unused, norm)
        logging.getLogger(__name__).info(f"Weights of {self._path}\n{self.loaded.block()}")
        if why := self.loaded.mistake(self._whole):
            mend = "" if self._whole else self.loaded.mend(self._path)
            raise InputError(f"MODEL.WEIGHTS {self._path}: {why}{mend}")


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there, its checksums hold, and it can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and "model" in read_content(path, "meta")
    except BROKEN:
        return False


def iteration_of(path: Path) -> int:
    """The last iteration that a whole checkpoint has seen, -1 for another kind of file."""
    try:
        content = read_content(path, "meta")
    except InputError:
        return -1
    iteration = content.get("iteration") if isinstance(content, Mapping) else None
    return iteration if type(iteration) is int else -1
