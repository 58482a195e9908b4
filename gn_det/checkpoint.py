"""What is known of initial weights before they are loaded: norm, colours, stride."""

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import InputError


@dataclass(frozen=True)
class Weights:
    """Facts about the file that `MODEL.WEIGHTS` names, in terms of the keys that must agree.

    Whatever is None is unknown. `norm` is "BN", or "GN" for any norm without running statistics.
    Where `fused` is true, BN was fused into its affine map and can serve as FrozenBN only.
    """

    norm: str | None = None
    num_groups: int | None = None
    depth: int | None = None
    stride_in_1x1: bool | None = None
    image_format: str | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    fused: bool = False


_MEAN, _STD = (103.530, 116.280, 123.675), (57.375, 57.120, 58.395)  # BGR
_MSRA = Weights(
    "BN", stride_in_1x1=True, image_format="BGR", pixel_mean=_MEAN, pixel_std=(1.0,) * 3
)
_GN = replace(_MSRA, norm="GN", num_groups=32, stride_in_1x1=False)
# Detectron2's ImageNetPretrained/, after its MODEL_ZOO.md, catalog.py and the configs that use them
PUBLISHED = {
    "MSRA/R-50": replace(_MSRA, depth=50),
    "MSRA/R-101": replace(_MSRA, depth=101),
    "FAIR/R-50-GN": replace(_GN, depth=50),
    "FAIR/R-101-GN": replace(_GN, depth=101),
    "FAIR/X-101-32x8d": replace(_MSRA, depth=101, stride_in_1x1=False, pixel_std=_STD),
    "torchvision/R-50": Weights("BN", None, 50, False, "RGB", _MEAN[::-1], _STD[::-1]),
}


def describe(weights: str) -> Weights:
    """What is known of the file that `MODEL.WEIGHTS` names.

    A published file is known by its name, without a download; one on this machine by the names of
    its tensors. Nothing is known of any other.

    Raises:
        InputError: if the file is there and cannot be read.
    """
    path = Path(weights.partition("?")[0])
    if path.is_file():
        return Weights(norm=_norm_of(tensor_names(path)))
    found = re.search(r"://.*ImageNetPretrained/(?:\d+/)?(.*?)(?:\.pkl)?$", weights)
    for name, facts in PUBLISHED.items():
        # Detectron's own addresses have a number in the place of FAIR
        if found and found[1] in (name, name.removeprefix("FAIR/")):
            if facts.norm == "BN" and not re.match("detectron2://|.*/detectron2/", weights):
                return replace(facts, fused=True, pixel_std=(1.0,) * 3)
            return facts
    return Weights()


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a `.pth` or `.pkl` file; none for other formats.

    Nothing but tensors, arrays and plain values is built from the file, whatever it asks for.

    Raises:
        InputError: if it cannot be read, or is no dictionary of tensors.
    """
    if path.suffix not in (".pth", ".pkl"):
        return []
    try:
        if path.suffix == ".pth":
            content = torch.load(path, map_location="meta", weights_only=True)
        else:
            with path.open("rb") as file:
                content = _ArrayUnpickler(file, encoding="latin1").load()
        for key in ("model", "blobs"):
            content = content.get(key, content)
        return [name for name in content if isinstance(name, str)]
    except (OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"it cannot be read as weights ({reason})") from None


# What pickled arrays are built with; NumPy has kept the names, but in modules that move
_ARRAY_PARTS = {
    "_reconstruct": np.empty(0).__reduce__()[0],
    "scalar": np.float32(0).__reduce__()[0],
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in _ARRAY_PARTS:
            return _ARRAY_PARTS[name]
        if (module, name) == ("_codecs", "encode"):
            return _encode  # how older pickles hold bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _norm_of(names: Iterable[str]) -> str | None:
    """The norm of the layers that tensors of these names belong to."""
    suffixes = {"BN": r"running_mean|_bn_s", "GN": r"norm\.weight|_gn_s|\bgn\d\.weight"}
    for norm, suffix in suffixes.items():
        if any(re.search(rf"(?:{suffix})$", name) for name in names):
            return norm
    return None
