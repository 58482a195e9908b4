"""Parts of a detector, by the names of its tensors."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

PARTS = {
    "ResNet": r"backbone\.(bottom_up\.)?(stem|res\d)\.",
    "FPN": r"backbone\.(fpn_|top_block)",
    "RPN": r"proposal_generator\.",
    "res5 (RoI head)": r"roi_heads\.res5\.",
    "box head": r"roi_heads\.box_head\.",
    "box predictor": r"roi_heads\.box_predictor\.",
    "mask predictor": r"roi_heads\.mask_head\.predictor\.",
    "mask head": r"roi_heads\.mask_head\.",
}
# What is pretrained
TRUNK = ("ResNet", "res5 (RoI head)", "backbone")
# Last layers, whose shapes follow from classes, keypoints or anchors
PREDICTORS = (
    r"(roi_heads\.box_predictor|mask_head\.predictor|keypoint_head\.score_lowres"
    r"|^sem_seg_head\.predictor|^head\.(cls_score|bbox_pred)"
    r"|rpn_head\.(objectness_logits|anchor_deltas))\."
)
# Tensors that hold settings or counters, and need not be in a file of weights
SETTINGS = r"pixel_mean|pixel_std|anchor_generator\.|(^|\.)mean$|(^|\.)std$|num_batches_tracked$"


def part_of(name: str) -> str:
    """The part of the model that a module or tensor of this name belongs to."""
    for part, pattern in PARTS.items():
        if re.match(pattern, name):
            return part
    return name.partition(".")[0]


def count_parts(names: Iterable[str]) -> dict[str, int]:
    """How many of the names belong to each part, in the order that pictures go through them."""
    counts = Counter(map(part_of, names))
    return {part: counts[part] for part in [*PARTS, *counts] if part in counts}


def weight_names(model: nn.Module) -> list[str]:
    """Names of the model's tensors that are trained, or taken from a file."""
    return [name for name in model.state_dict() if not re.search(SETTINGS, name)]
