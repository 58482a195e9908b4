"""Config keys and the shipped configs."""

from collections.abc import Iterator

import pytest
import torch
from conftest import ROOT, TINY
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

import gn_det
from gn_det.config import flatten
from gn_det.config_file import read_config
from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError

LEAVES = sorted(str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").glob("*/*.yaml"))
DETECTORS = [name for name in LEAVES if "_rcnn_" in name]
CLIPS = [name for name in LEAVES if "I3D" in name or "/clips" in name]
PRETRAININGS = [
    name for name in LEAVES if "/pretrain" in name or "ImageNet" in name or name in CLIPS
]


def test_add_gn_config_changes_only_the_given_config():
    cfg, other = get_cfg(), get_cfg()
    gn_det.add_gn_config(cfg)
    added = {key: value for key, value in flatten(cfg).items() if key not in flatten(other)}
    assert added == {
        "MODEL.GROUP_NORM.NUM_GROUPS": 32,
        "MODEL.GROUP_NORM.DIM_PER_GP": -1,
        "MODEL.GROUP_NORM.HEADS_NUM_GROUPS": -1,
        "MODEL.GROUP_NORM.HEADS_DIM_PER_GP": -1,
        "MODEL.GROUP_NORM.EPSILON": 1e-5,
        "MODEL.GROUP_NORM.IMPL": "fused",
        "MODEL.GROUP_NORM.RECOMPUTE": "norm",
        "MODEL.BATCH_RENORM.R_MAX": 1.5,
        "MODEL.BATCH_RENORM.D_MAX": 0.5,
        "MODEL.CHANNELS_LAST": False,
        "MODEL.RESNETS.ZERO_INIT_RESIDUAL": False,
        "MODEL.RESNETS.WEIGHT_STANDARDIZATION": False,
        "MODEL.VGG.DEPTH": 16,
        "MODEL.VGG.WIDTH": 64,
        "MODEL.VGG.NORM": "FrozenBN",
        "MODEL.VGG.OUT_FEATURES": ["conv5"],
        "MODEL.VGG.FC_DIM": 0,
        "MODEL.I3D.STEM_STRIDES": (2, 2),
        "SOLVER.ACCUMULATE_ITERS": 1,
        "SOLVER.AMP.DTYPE": "float16",
        "SOLVER.NORM_LR_FACTOR": 1.0,
        "SOLVER.BACKBONE_MULTIPLIER": 1.0,
        "SOLVER.MASK_HEAD_MULTIPLIER": 0.0,
        "SOLVER.KEEP_CHECKPOINTS": 0,
        "SOLVER.SKIP_BAD_BATCHES": 0,
        "SOLVER.PATIENCE": 0,
        "TEST.BEST_METRIC": "",
        "TEST.VALIDATION_LOSS": False,
        "TEST.DRAWN_IMAGES": 4,
        "TRACKERS": (),
        "PRETRAIN.EPOCHS": 100,
        "PRETRAIN.STEPS": (30, 60, 90),
        "PRETRAIN.REFERENCE_BATCH_SIZE": 256,
        "PRETRAIN.IMAGE_SIZE": 224,
        "PRETRAIN.MIN_CROP_AREA": 0.08,
        "PRETRAIN.DROPOUT": 0.0,
        "PRETRAIN.FRAMES": 32,
        "PRETRAIN.FRAME_STRIDE": 2,
        "PRETRAIN.TEST_CLIPS": 1,
    }
    assert "GROUP_NORM" not in get_cfg().MODEL


def test_combines_with_another_project():
    cfg = get_cfg()
    cfg.MODEL.OTHER = CfgNode({"KEY": 1})
    gn_det.add_gn_config(cfg)
    assert cfg.MODEL.OTHER.KEY == 1


def test_shipped_configs_are_found():
    assert len(DETECTORS) > 10 and len(PRETRAININGS) > 10
    for name in LEAVES:
        assert gn_det.get_config_file(name).endswith(name)


def test_error_for_an_unknown_config_lists_all_configs():
    with pytest.raises(InputError) as error:
        gn_det.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_9x.yaml")
    assert all(name in str(error.value) for name in LEAVES)


def batch_for(cfg: CfgNode) -> list[dict]:
    target = Instances((64, 64))
    target.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 50.0]]))
    target.gt_classes = torch.tensor([cfg.MODEL.ROI_HEADS.NUM_CLASSES - 1])
    target.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    image = {"image": torch.rand(3, 64, 64) * 255, "height": 64, "width": 64}
    return [{**image, "instances": target}] * 2


def architectures() -> Iterator[str]:
    """Shipped configs with different models; duplicates with other weights are skipped."""
    seen = set()
    for name in DETECTORS + PRETRAININGS:
        cfg = read_config(name, TINY).clone()
        cfg.defrost()
        if "SyncBN" in cfg.MODEL.RESNETS.NORM:
            continue  # does not train on a CPU
        cfg.MODEL.PIXEL_STD = []
        model = cfg.MODEL.dump()
        if model not in seen:
            seen.add(model)
            yield name


@pytest.mark.parametrize("name", architectures())
def test_every_model_trains(name):
    """One optimizer step on the CPU changes only parameters that are not frozen."""
    cfg = read_config(name, TINY)
    torch.manual_seed(0)
    model = build_model(cfg)
    if name in PRETRAININGS:
        expected: tuple[str, ...] = ("loss_cls",)
        shape = (2, 3, 8, 64, 64) if name in CLIPS else (2, 3, 64, 64)
        images = torch.randint(256, shape, dtype=torch.uint8)
        batch = [{"image": image, "label": i} for i, image in enumerate(images)]
    else:
        expected = ("loss_cls", "loss_rpn_cls", *(["loss_mask"] * cfg.MODEL.MASK_ON))
        batch = batch_for(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(losses[part] > 0 for part in expected)
    last = list(before)[-1]
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[key]), key
    assert not torch.equal(dict(model.named_parameters())[last], before[last])


# Keys that may differ in a fair comparison: norms, and keys that depend on the weights
ALLOWED = {
    *("MODEL.WEIGHTS", "MODEL.RESNETS.STRIDE_IN_1X1", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM"),
    *("MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM", "MODEL.VGG.NORM", "OUTPUT_DIR"),
}


def pairs() -> Iterator[tuple[str, str]]:
    """Pairs of a baseline and a config that is compared with it."""
    yield "Shapes/mask_rcnn_R_18_FPN_frozenbn", "Shapes/mask_rcnn_R_18_FPN_gn"
    yield "Shapes/mask_rcnn_R_18_FPN_frozenbn", "Shapes/mask_rcnn_R_18_FPN_bn"
    yield "Shapes/pretrain_R_18_bn", "Shapes/pretrain_R_18_gn"
    yield "Shapes/mask_rcnn_VGG_11_FPN_frozenbn", "Shapes/mask_rcnn_VGG_11_FPN_gn"
    yield "Shapes/pretrain_VGG_11_bn", "Shapes/pretrain_VGG_11_gn"
    yield "COCO-Detection/faster_rcnn_VGG_16_1x", "COCO-Detection/faster_rcnn_VGG_16_1x_gn"
    yield "ImageNet-Classification/VGG_16_bn", "ImageNet-Classification/VGG_16_gn"
    yield "Shapes/clips_R_18_bn", "Shapes/clips_R_18_gn"
    for frames in (32, 64):
        name = f"Kinetics-Classification/I3D_R_50_{frames}"
        yield f"{name}_bn", f"{name}_gn"
    for norm in ("gn", "ln", "in", "syncbn"):
        yield "ImageNet-Classification/R_50_bn", f"ImageNet-Classification/R_50_{norm}"
    yield "ImageNet-Classification/R_101_bn", "ImageNet-Classification/R_101_gn"
    for schedule in ("1x", "2x", "3x"):
        for folder, tag in (
            ("COCO-InstanceSegmentation", ""),
            ("Detectron1-Comparisons", "noaug_"),
        ):
            c4 = f"{folder}/mask_rcnn_R_50_C4_{tag}{schedule}"
            yield c4, f"{c4}_gn"
            for depth in (50, 101):
                fpn = f"{folder}/mask_rcnn_R_{depth}_FPN_{tag}{schedule}"
                yield f"{fpn}_4conv1fc", f"{fpn}_gn"
    ablation = "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_2x"
    for variant in ("boxgn", "boxbn", "bn", "gn_plainmask"):
        yield f"{ablation}_4conv1fc", f"{ablation}_{variant}"
    yield (
        "Detectron1-Comparisons/mask_rcnn_R_50_C4_noaug_2x",
        ("Detectron1-Comparisons/mask_rcnn_R_50_C4_noaug_2x_ln"),
    )
    for schedule in ("3x", "6x"):
        scratch = f"Detectron1-Comparisons/scratch_mask_rcnn_R_50_FPN_noaug_{schedule}"
        yield f"{scratch}_syncbn", f"{scratch}_gn"


@pytest.mark.parametrize(("baseline", "other"), pairs())
def test_comparisons_are_fair(baseline, other):
    one, two = (flatten(read_config(f"{name}.yaml")) for name in (baseline, other))
    different = {key for key in one if one[key] != two[key]}
    assert different and different <= ALLOWED


@pytest.mark.parametrize("name", LEAVES)
def test_configs_are_short(name):
    if "Base-" not in name:
        assert len((ROOT / "configs" / name).read_text().splitlines()) <= 15


@pytest.mark.parametrize(
    "opts",
    [["MODEL.GROUP_NORM.GROUPS", "8"], ["MODEL.GROUP_NORM.NUM_GROUPS", "many"], ["SOLVER.BASE_LR"]],
)
def test_invalid_keys_and_values(opts):
    with pytest.raises(InputError, match=r"Shapes/.*" + opts[0].split(".")[-1]):
        read_config("Shapes/mask_rcnn_R_18_FPN_gn.yaml", opts)
