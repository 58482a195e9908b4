"""A backbone's file: tensors under Detectron2's names, with the config keys that must agree."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from detectron2.config import CfgNode
from torch import Tensor

from ..config import value_of
from ..files import write_whole
from .facts import GROUP_NORM, KEYS, NORM, STRIDE, Facts

BOTTLENECK = (STRIDE, "MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP")


def save_backbone(tensors: Mapping[str, Tensor], cfg: CfgNode, path: Path) -> None:
    """Write a backbone for `MODEL.WEIGHTS`, and what must agree with it as YAML beside it.

    What they replace stays until both are written whole.

    Args:
        tensors: under Detectron2's names, without the prefix of a detector.
        cfg: the config that they were trained by.
    """
    facts = facts_of(cfg)
    content = {
        "model": {name: tensor.detach().cpu() for name, tensor in tensors.items()},
        "__author__": "gn_det",
        # Detectron2 then finds `backbone.bottom_up.` and the like by itself
        "matching_heuristics": True,
        "gn_det": facts,
    }
    with write_whole(path, "wb") as weights, write_whole(path.with_suffix(".yaml")) as text:
        save_content(content, weights)
        # Before either takes its place: the disk may be full
        weights.flush()
        text.write(keys_as_yaml(facts, path))


def save_content(content: dict[str, Any], file: IO[bytes]) -> None:
    """`torch.save`, whose error tells what the disk's was.

    Raises:
        OSError: by a disk that is full or gone.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # PyTorch goes on to the end of its archive, and then only sees that something is missing
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def facts_of(cfg: CfgNode) -> Facts:
    """The keys of a config that weights trained by it have to be used with."""
    # The blocks of ResNet-18 and 34 know neither 1x1 strides nor groups
    basic = cfg.MODEL.RESNETS.DEPTH in (18, 34)
    left_out = BOTTLENECK * basic + GROUP_NORM * (cfg.MODEL.RESNETS.NORM != "GN")
    facts = {key: value_of(cfg, key) for key in KEYS if key not in left_out}
    if facts[NORM] == "SyncBN":
        facts[NORM] = "BN"
    return facts


def keys_as_yaml(facts: Facts, weights: Path) -> str:
    """The facts as they stand in a config file that takes these weights."""
    tree: dict = {"MODEL": {"WEIGHTS": str(weights)}}
    for key, value in facts.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        # Of all that BN's tensors fit, what detectors are fine-tuned with
        node[last] = "FrozenBN" if (key, value) == (NORM, "BN") else value
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
