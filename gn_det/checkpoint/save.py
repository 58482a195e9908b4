"""Save a backbone together with the config keys that must agree with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from detectron2.config import CfgNode
from torch import Tensor

from ..config import value_of
from ..files import write_whole
from ..modeling.norm import backbone_norm, backbone_section
from .facts import GROUP_NORM, KEYS_OF, NORM_FACTS, STRIDE, Facts

# Keys that only affect bottleneck blocks
BOTTLENECK = (STRIDE, "MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP")


def save_backbone(
    tensors: Mapping[str, Tensor],
    cfg: CfgNode,
    path: Path,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Write a file for `MODEL.WEIGHTS`, and a YAML file with the matching config keys.

    Existing files are replaced only after both new files are complete.

    Args:
        tensors: the weights under the backbone's own names, such as "res2.0.conv1.weight".
        cfg: the config that they were trained with.
        path: the file to write; the YAML file has the same name with the suffix ".yaml".
        recipe: keys that fine-tuning should use; both files record them too.

    Raises:
        OSError: if the disk fails or is full.
    """
    facts = facts_of(cfg) | dict(recipe or {})
    content = {
        "model": {name: tensor.detach().cpu() for name, tensor in tensors.items()},
        "__author__": "gn_det",
        # Lets Detectron2 load these names into `backbone.bottom_up.` and the like
        "matching_heuristics": True,
        "gn_det": facts,
    }
    with write_whole(path, "wb") as weights, write_whole(path.with_suffix(".yaml")) as text:
        save_content(content, weights)
        # A full disk must fail here, before either file is replaced
        weights.flush()
        text.write(keys_as_yaml(facts, path))


def save_content(content: dict[str, Any], file: IO[bytes]) -> None:
    """`torch.save`, but with the original `OSError` if writing fails.

    Raises:
        OSError: if the disk fails or is full.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # PyTorch replaces the disk's error by its own, about an incomplete archive
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def facts_of(cfg: CfgNode) -> Facts:
    """The keys of a config that weights trained with it require."""
    # The basic blocks of ResNet-18 and 34 have neither 1x1 convolutions nor groups
    basic = cfg.MODEL.RESNETS.DEPTH in (18, 34)
    left_out = BOTTLENECK * basic + GROUP_NORM * (backbone_norm(cfg) != "GN")
    keys = KEYS_OF[backbone_section(cfg)]
    facts = {key: value_of(cfg, key) for key in keys if key not in left_out}
    renamed = {key: "BN" for key in NORM_FACTS if facts.get(key) in ("SyncBN", "BRN")}
    return facts | renamed


def keys_as_yaml(facts: Facts, weights: Path) -> str:
    """The facts as a YAML config, with `MODEL.WEIGHTS` set to `weights`."""
    tree: dict = {"MODEL": {"WEIGHTS": str(weights)}}
    for key, value in facts.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        # Of the norms with BN's tensors, FrozenBN is the usual one for fine-tuning detectors
        node[last] = "FrozenBN" if key in NORM_FACTS and value == "BN" else value
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
