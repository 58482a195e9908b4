"""Objects that a model cannot detect because of its anchors or its limit on detections."""

from collections.abc import Iterator

import numpy as np
from detectron2.config import CfgNode

from ..data.annotations import MAX_DETECTIONS
from ..data.object_sizes import ObjectSizes


def objects_out_of_reach(cfg: CfgNode, sizes: ObjectSizes) -> Iterator[str]:
    """Describe objects that a model with this config detects badly or not at all.

    An object is out of reach if no anchor has an IoU of 0.5 or more with it when both are centred
    at the same point (anchors are dense enough to ignore positions). So are objects beyond
    `TEST.DETECTIONS_PER_IMAGE`.

    Args:
        cfg: the config of a detector with anchors.
        sizes: sizes of the objects of a dataset.

    Yields:
        at most two messages, each with a count or share and the config key to change.
    """
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    each = np.bincount(sizes.owners)
    if count := int((each.clip(max=MAX_DETECTIONS) > limit).sum()):
        yield (
            f"{count} image{'s have' if count > 1 else ' has'} more objects (up to {each.max()}) "
            f"than TEST.DETECTIONS_PER_IMAGE {limit} allows: set it to {MAX_DETECTIONS}"
        )
    side, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    objects = sizes.resized(side, longest)[:, None]
    areas = np.array([s**2 for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES for s in level])
    ratios = np.array([r for level in cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS for r in level])
    widths = np.sqrt(areas[:, None] / ratios).ravel()
    heights = np.sqrt(areas[:, None] * ratios).ravel()
    anchors = np.stack([widths, heights], axis=1)[None]
    intersection = np.minimum(objects, anchors).prod(2)
    iou = intersection / (objects.prod(2) + anchors.prod(2) - intersection)
    if share := float((iou.max(1) < 0.5).mean()):
        small = (objects.prod(2)[:, 0] < areas.min()).mean()
        yield (
            f"{share:.1%} of the objects have an IoU below 0.5 with every anchor "
            f"({small:.1%} are smaller than all anchors): adapt MODEL.ANCHOR_GENERATOR"
        )
