"""The parts of a detector, recognized by the names of its tensors."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

# Part -> pattern of the names of its tensors; the first match counts
PARTS = {
    "ResNet": r"backbone\.(bottom_up\.)?(stem|res\d)\.",
    "VGG": r"backbone\.(bottom_up\.)?conv\d_\d\b",
    "FPN": r"backbone\.(fpn_|top_block)",
    "RPN": r"proposal_generator\.",
    "res5 (RoI head)": r"roi_heads\.res5\.",
    "box head": r"roi_heads\.box_head\.",
    "box predictor": r"roi_heads\.box_predictor\.",
    "mask predictor": r"roi_heads\.mask_head\.predictor\.",
    "mask head": r"roi_heads\.mask_head\.",
}
# Parts with pretrained weights; "backbone" stands for other backbones
BACKBONE_PARTS = ("ResNet", "res5 (RoI head)", "VGG", "backbone")
MASK_HEAD_PARTS = ("mask head", "mask predictor")
# Last layers, whose shapes depend on the number of classes, keypoints or anchors
PREDICTORS = (
    r"(roi_heads\.box_predictor|mask_head\.predictor|keypoint_head\.score_lowres"
    r"|^sem_seg_head\.predictor|^head\.(cls_score|bbox_pred)"
    r"|rpn_head\.(objectness_logits|anchor_deltas))\."
)
# Tensors that hold settings or counters, which a weights file may lack
SETTINGS = r"pixel_mean|pixel_std|anchor_generator\.|(^|\.)mean$|(^|\.)std$|num_batches_tracked$"


def part_of(name: str) -> str:
    """Return the part of the model that a module or tensor belongs to.

    Args:
        name: its full name, as "roi_heads.box_head.conv1.weight".

    Returns:
        a key of `PARTS`, or the first component of other names.
    """
    for part, pattern in PARTS.items():
        if re.match(pattern, name):
            return part
    return name.partition(".")[0]


def count_parts(names: Iterable[str]) -> dict[str, int]:
    """Count the names in each part, in the order of `PARTS`."""
    counts = Counter(map(part_of, names))
    return {part: counts[part] for part in [*PARTS, *counts] if part in counts}


def weight_names(model: nn.Module) -> list[str]:
    """List the names of the model's tensors that are trained or loaded from a weights file."""
    return [name for name in model.state_dict() if not re.search(SETTINGS, name)]
