"""The paper's claims on detection, and the small detectors that test them on the dataset `shapes`.

A step always has 4 images, seen by the network in 1, 2 or 4 passes. So BN's batch changes, and
number of steps, data and learning rate do not. BN* and GN have the better of two learning rates
each, by a trial with one seed (box AP / mask AP after 160 steps): 0.02 gave 27.4 / 27.4 and 27.4 /
25.2, and 0.04 gave 23.3 / 23.4 and 32.3 / 29.9.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from gn_det.modeling.norm import NORM_KEYS

IMAGES = 4  # per step
FPN, C4 = "mask_rcnn_R_18_FPN_gn", "mask_rcnn_R_50_C4_gn"
PRETRAININGS = {FPN: "pretrain_R_18_gn", C4: "pretrain_R_50_gn"}
BACKBONE, *HEADS = NORM_KEYS.values()


@dataclass(frozen=True)
class Detector:
    """A detector of one of the paper's tables.

    Args:
        name: in the results, and in the names of output folders.
        backbone: norm of the backbone.
        heads: norms of FPN, box head and mask head; empty for C4.
        config: name of a config in `configs/Shapes`.
        grouping: of the backbone's GN, as `KEY VALUE`.
        passes: that the images of a step are divided into.
        length: factor on the number of steps.
        scratch: train without a pretrained backbone.
        unchecked: train although the checks refuse the recipe.
    """

    name: str
    backbone: str = "GN"
    heads: tuple[str, ...] = ("GN", "GN", "GN")
    config: str = FPN
    grouping: tuple[str, ...] = ()
    passes: int = 1
    length: int = 1
    scratch: bool = False
    unchecked: bool = False

    @property
    def pretraining(self) -> str:
        """Name of the pretrained backbone, made of all settings that it depends on."""
        norm = self.backbone.replace("Frozen", "")
        grouping = "_".join(self.grouping[1::2])
        return f"{PRETRAININGS[self.config]}_{norm}{f'_{grouping}' * bool(grouping)}"

    @property
    def rate(self) -> float:
        """Its learning rate: the one found for GN if the mask head has GN, else that for BN*."""
        return 0.04 if self.heads[2:] == ("GN",) else 0.02

    def keys(self) -> dict[str, Any]:
        """Config keys of its norms, frozen stages, learning rate and passes."""
        names = HEADS if self.heads else ()
        frozen = 0 if self.scratch and not self.unchecked else 2
        return {
            BACKBONE: self.backbone,
            **dict(zip(names, self.heads, strict=True)),
            "MODEL.BACKBONE.FREEZE_AT": frozen,
            "SOLVER.IMS_PER_BATCH": IMAGES,
            "SOLVER.ACCUMULATE_ITERS": self.passes,
            "SOLVER.BASE_LR": self.rate,
        }


class Claim(NamedTuple):
    """A sentence of the paper about two detectors.

    Args:
        table: of the paper.
        sentence: what is claimed.
        paper: box AP / mask AP on COCO that it rests on; "" where the paper gives none.
        above: the detector that should have the higher AP.
        below: the other one.
    """

    table: str
    sentence: str
    paper: str
    above: Detector
    below: Detector


def plain(name: str, backbone: str, box: str = "", **settings: Any) -> Detector:
    """A detector without norm in FPN and mask head."""
    return Detector(name, backbone, ("", box, ""), **settings)


BN_STAR, GN = plain("BN*", "FrozenBN"), Detector("GN")
BN = {
    passes: plain(f"BN, {IMAGES // passes} a pass", "BN", passes=passes, unchecked=passes == IMAGES)
    for passes in (1, 2, 4)
}
BOX_GN = plain("BN*, GN in the box head", "FrozenBN", "GN")
BOX_BN = plain("BN*, BN in the box head, 1 a pass", "FrozenBN", "BN", passes=4, unchecked=True)
PLAIN_MASK = Detector("GN, plain mask head", heads=("GN", "GN", ""))
LONG = Detector("GN, long", length=2)
SCRATCH = Detector("GN from scratch, long", length=2, scratch=True)
ACCIDENT = Detector("the same, frozen at random", length=2, scratch=True, unchecked=True)
LN = Detector("LN in the backbone", "LN")
WIDE = Detector("GN, 16 channels a group", grouping=("MODEL.GROUP_NORM.DIM_PER_GP", "16"))
C4_BN_STAR, C4_GN, C4_LN = (
    Detector(f"C4, {name}", norm, heads=(), config=C4)
    for name, norm in (("BN*", "FrozenBN"), ("GN", "GN"), ("LN", "LN"))
)

CLAIMS = (
    Claim("5", "GN in the box head helps BN*", "39.5 and 38.6", BOX_GN, BN_STAR),
    Claim("5", "GN in the backbone helps, too", "40.0 and 39.5", PLAIN_MASK, BOX_GN),
    Claim("5", "BN in the box head hurts", "by about 9", BOX_GN, BOX_BN),
    Claim("5", "BN that is not frozen is below BN*", "by about 6", BN_STAR, BN[2]),
    Claim("6", "GN everywhere is above BN*", "40.3 and 38.6", GN, BN_STAR),
    Claim("6", "A long schedule helps GN", "40.8 and 40.3", LONG, GN),
    Claim("7", "Pretraining helps with a long schedule, too", "40.8 and 39.5", LONG, SCRATCH),
    Claim("7", "A stem frozen with random weights costs AP", "39.5 and 36.2", SCRATCH, ACCIDENT),
    Claim("3", "GN is above LN in the backbone", "", GN, LN),
    Claim("", "AP of BN falls from 4 images a pass to 1", "", BN[1], BN[4]),
    *(
        Claim("", f"GN is above BN at {IMAGES // passes} a pass", "", GN, BN[passes])
        for passes in (4, 2, 1)
    ),
)
# Of the larger profile: C4's backbone needs a longer pretraining
LARGER_CLAIMS = (
    *CLAIMS,
    Claim("3", "16 channels a group are above LN in the backbone", "", WIDE, LN),
    Claim("4", "C4: GN is above BN*", "38.8 and 37.7", C4_GN, C4_BN_STAR),
    Claim("4", "C4: GN is above LN", "by 1.9", C4_GN, C4_LN),
)


def detectors_of(claims: tuple[Claim, ...]) -> list[Detector]:
    """The detectors that claims are about, each once."""
    return list(dict.fromkeys(d for claim in claims for d in (claim.below, claim.above)))
