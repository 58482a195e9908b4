"""Group Normalization for Detectron2. Importing it registers backbones, heads and datasets.

Without Detectron2, only `gn_det.layers` can be imported; it needs nothing but PyTorch.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import NO_DETECTRON2

if TYPE_CHECKING:
    from .engine.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["add_gn_config", "check_config", "get_config_file", "load_predictor"]

if find_spec("detectron2") is not None:
    with warnings.catch_warnings():
        # Detectron2 calls torch.jit.script while it is imported, which PyTorch has deprecated
        warnings.filterwarnings("ignore", r".*torch\.jit\.", FutureWarning)
        from . import data, modeling  # noqa: F401  (registration)
        from .check import check_config
        from .config import add_gn_config
        from .model_zoo import get_config_file

    def load_predictor(folder: str | Path, *opts: str) -> "Predictor":
        """Load the model of a finished run; see `gn_det.engine.predictor.load_predictor`."""
        from .engine import predictor  # loaded only when needed, as it imports most of gn_det

        return predictor.load_predictor(folder, *opts)

else:

    def __getattr__(name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(NO_DETECTRON2)
