"""Objects that a model's anchors and its limit on detections leave out."""

from collections.abc import Iterator

import numpy as np
from detectron2.config import CfgNode

from ..data.annotations import CAP
from ..data.object_sizes import ObjectSizes


def objects_out_of_reach(cfg: CfgNode, sizes: ObjectSizes) -> Iterator[str]:
    """Objects that a model of this config cannot find well or at all, in words, if any.

    These are objects whose shape overlaps with no anchor's by half (positions are left out: anchors
    stand dense enough), and those beyond the detections that a picture may have.
    """
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    each = np.bincount(sizes.owners)
    if count := int((each.clip(max=CAP) > limit).sum()):
        yield (
            f"{count} picture{'s have' if count > 1 else ' has'} more objects (up to {each.max()}) "
            f"than TEST.DETECTIONS_PER_IMAGE {limit} lets be found: give it as {CAP}"
        )
    side, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    objects = sizes.resized(side, longest)[:, None]
    areas = np.array([s**2 for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES for s in level])
    ratios = np.array([r for level in cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS for r in level])
    widths = np.sqrt(areas[:, None] / ratios).ravel()
    heights = np.sqrt(areas[:, None] * ratios).ravel()
    anchors = np.stack([widths, heights], axis=1)[None]
    common = np.minimum(objects, anchors).prod(2)
    overlap = common / (objects.prod(2) + anchors.prod(2) - common)
    if share := float((overlap.max(1) < 0.5).mean()):
        small = (objects.prod(2)[:, 0] < areas.min()).mean()
        yield (
            f"{share:.1%} of the objects have a shape that no anchor overlaps with by half "
            f"({small:.1%} are smaller than all anchors): MODEL.ANCHOR_GENERATOR has the anchors"
        )
