"""Group Normalization for Detectron2: importing this registers backbones, heads and data sets."""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError:
    raise ImportError(
        "gn_det needs Detectron2: install its official main, "
        "https://github.com/facebookresearch/detectron2, or run tools/install_detectron2.py"
    ) from None

from . import data, modeling  # noqa: F401  (registration)
from .check import check_config
from .config import add_gn_config
from .model_zoo import get_config_file

__version__ = "0.1.0"
__all__ = ["add_gn_config", "check_config", "get_config_file"]
