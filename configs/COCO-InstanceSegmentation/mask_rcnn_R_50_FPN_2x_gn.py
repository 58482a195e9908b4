"""LazyConfig of the YAML config of the same name, for Detectron2's `lazyconfig_train_net.py`."""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, GeneralizedRCNN, ResNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from gn_det.layers import GroupNorm
from gn_det.modeling import GNFastRCNNConvFCHead, GNMaskRCNNConvUpsampleHead, implement

# For another grouping: norm = functools.partial(GroupNorm, num_groups=16)
norm = GroupNorm
levels = ["p2", "p3", "p4", "p5"]


def pooler(size):
    return L(ROIPooler)(
        output_size=size,
        scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32),
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )


model = L(GeneralizedRCNN)(
    backbone=L(implement)(
        module=L(FPN)(
            bottom_up=L(ResNet)(
                stem=L(BasicStem)(norm=norm),
                stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm=norm),
                out_features=["res2", "res3", "res4", "res5"],
                freeze_at=2,
            ),
            in_features="${.bottom_up.out_features}",
            out_channels=256,
            norm=norm,
            top_block=L(LastLevelMaxPool)(),
        ),
    ),
    proposal_generator=L(RPN)(
        in_features=[*levels, "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            strides=[4, 8, 16, 32, 64],
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),
        post_nms_topk=(1000, 1000),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1]),
        box_in_features=levels,
        box_pooler=pooler(7),
        box_head=L(GNFastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[256] * 4,
            fc_dims=[1024],
            conv_norm=norm,
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            box2box_transform=L(Box2BoxTransform)(weights=(10.0, 10.0, 5.0, 5.0)),
            num_classes="${..num_classes}",
            test_score_thresh=0.05,
        ),
        mask_in_features=levels,
        mask_pooler=pooler(14),
        mask_head=L(GNMaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=256, height=14, width=14),
            num_classes="${..num_classes}",
            conv_dims=[256] * 5,
            conv_norm=norm,
        ),
    ),
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=(640, 672, 704, 736, 768, 800),
                    sample_style="choice",
                    max_size=1333,
                ),
                L(T.RandomFlip)(),
            ],
            image_format="${model.input_format}",
            use_instance_mask=True,
        ),
        total_batch_size=16,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
            image_format="${model.input_format}",
        ),
        num_workers=4,
    ),
    "evaluator": L(COCOEvaluator)(dataset_name="${dataloader.test.dataset.names}"),
}

optimizer = L(torch.optim.SGD)(
    # `params.model` is set by the training script
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[120000, 160000], num_updates=180000
    ),
    warmup_factor=0.001,
    warmup_length=1000 / 180000,
    warmup_method="linear",
)

train = {
    "output_dir": "./output",
    "init_checkpoint": "catalog://ImageNetPretrained/FAIR/R-50-GN",
    "max_iter": 180000,
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
}
