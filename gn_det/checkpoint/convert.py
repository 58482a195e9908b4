"""A backbone from any source as Detectron2 takes it, with every tensor accounted for."""

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet, build_backbone
from torch import Tensor

from ..config import add_gn_config, value_of
from ..errors import InputError
from ..modeling.norm import is_group_norm
from .facts import (
    GROUP_NORM,
    NORM,
    PIXELS,
    STANDARDIZATION,
    STRIDE,
    Facts,
    architecture,
    written_facts,
)
from .names import AUTHORS, CAFFE_PIXELS, SOURCES, TORCH_PIXELS, find_source, rename
from .read import WeightsFile

# Median |mean| / (std / sqrt(n)) of filters of n weights: 0.67 for random ones, and above it for
# trained ones. Under weight standardisation no gradient reaches the mean, which only decays
STANDARDIZED_BELOW = 0.35


@dataclass
class Conversion:
    """A ResNet's tensors under Detectron2's names, and the account of all others.

    `cfg` describes the ResNet: architecture, norm, stride and pixels.
    """

    tensors: dict[str, Tensor]
    cfg: CfgNode
    source: str
    # name in the file -> why it was left out
    dropped: dict[str, str]
    # under Detectron2's names: those that the ResNet has and the file has not, or in another shape
    missing: list[str]
    # in the file, and nothing that the ResNet has
    unknown: list[str]
    # that the file has no need of, under Detectron2's names
    made: list[str]
    # config keys that the file does not tell, as they mostly are with its source
    assumed: Facts
    # tensors that stand in other places of the file, by place
    others: dict[str, int]

    def account(self) -> Iterator[str]:
        """Lines for people: tensors taken, made, dropped and why, missing, unknown."""
        yield f"taken    {len(self.tensors) - len(self.made):4} tensors, named by {self.source}"
        if self.made:
            yield f"made     {len(self.made):4} (mean 0 and variance 1: BN is fused in this file)"
        yield f"dropped  {len(self.dropped):4}"
        for why, count in Counter(self.dropped.values()).items():
            first = next(name for name, reason in self.dropped.items() if reason == why)
            yield f"         {count:4} {why}: {first}{', ...' * (count > 1)}"
        for title, names in (("missing", self.missing), ("unknown", self.unknown)):
            yield f"{title}  {len(names):4}" + "".join(f"\n              {n}" for n in names[:8])
        for place, count in self.others.items():
            yield f"beside   {count:4} under {place or 'no name'}, not looked at"
        if self.assumed:
            told = ", ".join(f"{key} {value}" for key, value in self.assumed.items())
            yield f"assumed  {told}, as usual with {self.source}; KEY VALUE pairs change it"

    def refuse_gaps(self, missing: Sequence[str] = (), unknown: Sequence[str] = ()) -> None:
        """Stop unless everything missing or unknown was foreseen.

        Args:
            missing, unknown: names or patterns of names (`res5.*`) that are no mistake.

        Raises:
            InputError: naming the first of the others, and the flag that lets them pass.
        """
        for title, flag, names, foreseen in (
            ("missing from the file", "--allow-missing", self.missing, missing),
            ("unknown to Detectron2's ResNet", "--allow-unknown", self.unknown, unknown),
        ):
            left = [n for n in names if not any(fnmatch(n.split(" ")[0], p) for p in foreseen)]
            if left:
                raise InputError(
                    f"{len(left)} tensors are {title}, {left[0]} the first: give {flag} with their "
                    "names or a pattern if that is right, and else another file or --source"
                )


def convert(
    file: WeightsFile, source: str = "auto", opts: Sequence[str] = (), prefix: str | None = None
) -> Conversion:
    """Bring a backbone's tensors under Detectron2's names, and say what they have to agree with.

    Args:
        source: one of `SOURCES`, or "auto" to tell by the names.
        opts: `KEY VALUE` pairs for what names cannot tell, such as `INPUT.FORMAT BGR`.
        prefix: how the names of the network begin, where the file holds several.

    Raises:
        InputError: for what Detectron2's ResNet cannot compute: pre-activation networks, other
            stems, filters that were trained standardised, groups that do not divide the channels;
            for values that no network has, and keys that contradict the file.
    """
    found = find_source(file.tensors)
    source = found if source == "auto" else source
    renamed = rename(file.tensors, SOURCES[source], prefix)
    shape = architecture(renamed.tensors)
    if not shape:
        raise InputError(
            "its blocks are not those of ResNet-18, 34, 50, 101 or 152; their names begin with "
            f"{min(renamed.tensors, default=min(file.tensors))}"
        )
    written = written_facts(file)
    usual = usual_facts(file, source, renamed.norm, shape, opts)
    facts = usual | {NORM: renamed.norm} | written | shape
    if STRIDE not in facts:
        # MSRA's and Detectron's BN models alone; every GN one has it on the 3x3
        wide = facts.get("MODEL.RESNETS.NUM_GROUPS", 1) > 1
        facts[STRIDE] = renamed.norm != "GN" and not wide
    cfg = backbone_config(facts, opts)
    if is_group_norm(cfg.MODEL.RESNETS.NORM) != (renamed.norm == "GN"):
        raise InputError(
            f"{NORM} {cfg.MODEL.RESNETS.NORM}: it has {renamed.norm}'s tensors; --norm GN "
            "--calibrate PICTURES makes GN of BN"
        )
    assumed = assumed_facts(cfg, {*opts, *written})
    if STANDARDIZATION not in {*opts, *written} and looks_standardized(renamed.tensors):
        raise InputError(
            "its filters have no mean, as after training with weight standardisation, and plain "
            f"convolutions would compute something else: add {STANDARDIZATION} True for "
            "standardised convolutions, or False if they were trained plain"
        )
    made = _make_statistics(renamed.tensors) if renamed.norm == "FrozenBN" else []
    tensors, missing = _take(renamed.tensors, build_resnet(cfg))
    unknown = [*renamed.unknown, *(name for name in renamed.tensors if name not in tensors)]
    unknown = [name for name in unknown if name not in {m.split(" ")[0] for m in missing}]
    dropped, others = renamed.dropped, file.others
    return Conversion(tensors, cfg, source, dropped, missing, unknown, made, assumed, others)


def assumed_facts(cfg: CfgNode, told: Container[str]) -> Facts:
    """What a config has of keys that neither a file nor its owner has told."""
    keys = [STRIDE, *PIXELS]
    if is_group_norm(cfg.MODEL.RESNETS.NORM):
        # Without running statistics gamma and beta are taken to be GN's, of Detectron's division
        keys = [NORM, *GROUP_NORM[: GROUP_NORM[1] not in told], *keys]
    return {key: value_of(cfg, key) for key in keys if key not in told}


def usual_facts(
    file: WeightsFile, source: str, norm: str | None, shape: Facts, opts: Sequence[str]
) -> Facts:
    """What mostly holds for files of a source, where the file does not tell itself."""
    facts = dict(SOURCES[source].facts)
    if source == "detectron2":
        facts |= AUTHORS.get(file.author, {})
    if source == "mmdetection" and STANDARDIZATION in opts:
        facts |= TORCH_PIXELS  # those of GN+WS come from PyTorch, those of GN from Detectron
    if source == "detectron" and norm == "BN" and shape.get("MODEL.RESNETS.NUM_GROUPS", 1) > 1:
        facts["MODEL.PIXEL_STD"] = TORCH_PIXELS["MODEL.PIXEL_STD"][::-1]  # X-101-32x8d
    told = dict(zip(opts[::2], opts[1::2], strict=False))
    if told.get("INPUT.FORMAT", facts["INPUT.FORMAT"]) != facts["INPUT.FORMAT"]:
        # Mean and std are told in the order of the colours
        facts |= {key: facts[key][::-1] for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")}
    return facts


def backbone_config(facts: Facts, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a whole ResNet on the CPU, with nothing frozen.

    Raises:
        InputError: for keys or values that do not fit.
    """
    cfg = get_cfg()
    add_gn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    # Calibration looks at what each norm puts out by itself
    cfg.MODEL.GROUP_NORM.IMPL = "native"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    merge_pairs(cfg, [word for pair in facts.items() for word in pair])
    merge_pairs(cfg, opts)
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(f'INPUT.FORMAT {cfg.INPUT.FORMAT}: backbones take "RGB" or "BGR"')
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = cfg.MODEL[key]
        if len(values) != 3 or (key == "PIXEL_STD" and min(values) <= 0):
            raise InputError(f"MODEL.{key} {values}: give three values, of a std above 0")
    return cfg


def merge_pairs(cfg: CfgNode, pairs: Sequence[str]) -> None:
    """Set config keys, in place.

    Raises:
        InputError: for keys or values that do not fit.
    """
    try:
        cfg.merge_from_list(list(pairs))
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"{' '.join(map(str, pairs))}: {error}") from None


def build_resnet(cfg: CfgNode, tensors: Mapping[str, Tensor] | None = None) -> ResNet:
    """The ResNet of `backbone_config`, in evaluation mode, on `MODEL.DEVICE`.

    Args:
        tensors: its weights; what it has no layer for is left. Without them it has no values
            either, and is on PyTorch's meta device.

    Raises:
        InputError: if Detectron2 has no such ResNet, or groups do not divide its channels.
    """
    try:
        with torch.device("meta"):
            resnet = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    except (AssertionError, KeyError) as error:
        raise InputError(f"Detectron2 has no such ResNet: {error}") from None
    if tensors is None:
        return resnet
    own = {name: tensors[name].clone() for name in resnet.state_dict() if name in tensors}
    resnet.load_state_dict(own, strict=False, assign=True)
    return resnet.to(cfg.MODEL.DEVICE)


def fold_input(conversion: Conversion) -> None:
    """Rewrite the first convolution, in place, for BGR pictures of pixel standard deviation 1.

    With PyTorch's mean that makes Detectron2's defaults. The mean stays, in BGR order: after zero
    padding, no change of weights would make up for another one.

    Raises:
        InputError: for standardised filters, which do not keep a scale.
    """
    keys, weight = conversion.cfg, conversion.tensors["stem.conv1.weight"]
    if keys.MODEL.RESNETS.WEIGHT_STANDARDIZATION:
        raise InputError("--fold-input would change standardised filters: leave it out")
    std = torch.tensor(keys.MODEL.PIXEL_STD, dtype=torch.float64).view(1, 3, 1, 1)
    weight = weight.double() / std
    if keys.INPUT.FORMAT == "RGB":
        weight = weight.flip(1)
        keys.MODEL.PIXEL_MEAN = list(keys.MODEL.PIXEL_MEAN)[::-1]
    conversion.tensors["stem.conv1.weight"] = weight.float().contiguous()
    keys.INPUT.FORMAT, keys.MODEL.PIXEL_STD = "BGR", CAFFE_PIXELS["MODEL.PIXEL_STD"]


def looks_standardized(tensors: dict[str, Tensor]) -> bool:
    """Whether filters look as training with weight standardisation leaves them.

    Its gradient has no part along a filter's mean, so that weight decay alone moves the mean, to 0.
    """
    ratios = []
    for name, weight in tensors.items():
        if weight.dim() == 4 and not name.startswith("stem"):
            std, mean = torch.std_mean(weight.float().flatten(1), dim=1)
            ratios.append(mean.abs() * weight[0].numel() ** 0.5 / std.clamp(min=1e-12))
    return bool(torch.cat(ratios).median() < STANDARDIZED_BELOW)


def _take(tensors: dict[str, Tensor], resnet: ResNet) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that a ResNet has, and the names of those that are not there or do not fit.

    Raises:
        InputError: for values that no network has.
    """
    taken, missing = {}, []
    for name, wanted in resnet.state_dict().items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape == wanted.shape:
            taken[name] = tensor.float()
            if not tensor.is_floating_point():
                raise InputError(f"its {name} has whole numbers ({tensor.dtype}): it is quantised")
            if not taken[name].isfinite().all():
                raise InputError(f"its {name} is infinite or NaN: take an earlier checkpoint")
            if name.endswith("running_var") and (taken[name] < 0).any():
                raise InputError(f"its {name} is below 0, which no variance is")
        elif tensor is not None:
            missing.append(f"{name} of shape {(*wanted.shape,)}: it is {(*tensor.shape,)}")
        elif not name.endswith("num_batches_tracked"):
            missing.append(name)
    return taken, missing


def _make_statistics(tensors: dict[str, Tensor]) -> list[str]:
    """Add the statistics under which FrozenBN is the affine map that BN was fused into."""
    made = []
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        layer = name.removesuffix("weight")
        gamma = tensors[name]
        for statistic, value in (("running_mean", 0.0), ("running_var", 1.0 - 1e-5)):
            tensors[layer + statistic] = torch.full_like(gamma, value)
            made.append(layer + statistic)
    return made
