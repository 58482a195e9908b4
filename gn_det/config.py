"""The config keys that gn_det adds to Detectron2's."""

from detectron2.config import CfgNode


def add_gn_config(cfg: CfgNode) -> None:
    """Add `MODEL.GROUP_NORM` to `cfg`, with the names Detectron and maskrcnn-benchmark gave it.

    Call it between `get_cfg()` and `merge_from_file`. It touches no other key and no global
    default, so it composes with other plugins' `add_*_config`.
    """
    cfg.MODEL.GROUP_NORM = CfgNode()
    # Number of groups G, of every layer whose NORM is "GN"
    cfg.MODEL.GROUP_NORM.NUM_GROUPS = 32
    # Channels per group C/G, used instead of NUM_GROUPS unless -1
    cfg.MODEL.GROUP_NORM.DIM_PER_GP = -1
    # Added to the variance, of every layer whose NORM is "GN", "LN" or "IN"
    cfg.MODEL.GROUP_NORM.EPSILON = 1e-5
