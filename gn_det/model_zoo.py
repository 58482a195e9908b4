"""The configs that ship with gn_det."""

from pathlib import Path

from .errors import InputError

# An installed wheel has the configs inside the package, a checkout beside it
_INSTALLED = Path(__file__).parent / "configs"
CONFIG_ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def get_config_file(name: str) -> str:
    """The path of a shipped config, as Detectron2's `model_zoo.get_config_file`.

    Args:
        name: path below `configs/`, as `COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn.yaml`.

    Returns:
        the path as a string.

    Raises:
        InputError: if there is no such config; the message lists all shipped configs.
    """
    path = CONFIG_ROOT / name
    if not path.is_file():
        known = sorted(str(p.relative_to(CONFIG_ROOT)) for p in CONFIG_ROOT.glob("*/*.yaml"))
        raise InputError("\n  ".join([f"there is no config {name}; gn_det ships", *known]))
    return str(path)
