"""The config keys that gn_det adds to those of Detectron2, and helpers for configs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from .errors import InputError


def add_gn_config(cfg: CfgNode) -> None:
    """Add gn_det's keys to `cfg`.

    Call it between `get_cfg()` and `merge_from_file`. It changes no existing key and no global
    default, so it can be combined with `add_*_config` functions of other projects. Key names follow
    earlier implementations, such as Detectron's `DIM_PER_GP`.

    Args:
        cfg: changed in place.
    """
    cfg.MODEL.GROUP_NORM = CfgNode()
    # Number of groups G in each layer whose NORM is "GN"
    cfg.MODEL.GROUP_NORM.NUM_GROUPS = 32
    # Channels per group C/G; used instead of NUM_GROUPS unless it is -1
    cfg.MODEL.GROUP_NORM.DIM_PER_GP = -1
    # Number of groups in FPN and heads; -1 uses the grouping of the ResNet
    cfg.MODEL.GROUP_NORM.HEADS_NUM_GROUPS = -1
    # Channels per group in FPN and heads; used instead of HEADS_NUM_GROUPS unless it is -1
    cfg.MODEL.GROUP_NORM.HEADS_DIM_PER_GP = -1
    # Added to the variance in each layer whose NORM is "GN", "LN" or "IN"
    cfg.MODEL.GROUP_NORM.EPSILON = 1e-5
    # "fused": norm, residual addition and ReLU in one operator, for GN and frozen BN;
    # "native": PyTorch's operators in Detectron2's blocks
    cfg.MODEL.GROUP_NORM.IMPL = "fused"
    # Activations that fused GN recomputes in the backward pass instead of storing them:
    # "none"; "norm": outputs of norms with ReLU, convolutions of shortcuts, and lateral ones of the
    # FPN; "conv3": also the last convolution of each bottleneck, and the outputs of the FPN;
    # "block": whole residual blocks, and those of the FPN
    cfg.MODEL.GROUP_NORM.RECOMPUTE = "norm"

    # Limits of the correction of "BRN", Batch Renormalization
    cfg.MODEL.BATCH_RENORM = CfgNode()
    cfg.MODEL.BATCH_RENORM.R_MAX = 1.5
    cfg.MODEL.BATCH_RENORM.D_MAX = 0.5

    # Use the channels_last memory format in backbone and heads
    cfg.MODEL.CHANNELS_LAST = False

    # Initialize gamma of the last norm in each residual block to 0 (Section 4.1 of the paper)
    cfg.MODEL.RESNETS.ZERO_INIT_RESIDUAL = False
    # Standardize the weights of the ResNet's convolutions (Weight Standardization, GN+WS)
    cfg.MODEL.RESNETS.WEIGHT_STANDARDIZATION = False

    cfg.MODEL.VGG = CfgNode()
    # 11, 13, 16 or 19 layers, of which 3 are the original's fully connected ones
    cfg.MODEL.VGG.DEPTH = 16
    # Channels of the first stage; the others have 2, 4, 8 and 8 times as many
    cfg.MODEL.VGG.WIDTH = 64
    # Norm after each convolution, as MODEL.RESNETS.NORM; "" as in the original
    cfg.MODEL.VGG.NORM = "FrozenBN"
    # "conv1" to "conv5" at strides 1 to 16, and "pool5" at stride 32
    cfg.MODEL.VGG.OUT_FEATURES = ["conv5"]
    # Units of the classifier's two hidden layers, 4096 in the original; 0 for none, after which
    # the classifier averages over positions as for a ResNet
    cfg.MODEL.VGG.FC_DIM = 0

    cfg.MODEL.I3D = CfgNode()
    # Temporal strides of the stem's convolution and pooling in build_gn_i3d_resnet_backbone
    cfg.MODEL.I3D.STEM_STRIDES = (2, 2)

    # Split each batch of IMS_PER_BATCH images into this many passes and accumulate the gradients:
    # the memory of one pass, the optimizer step of the full batch
    cfg.SOLVER.ACCUMULATE_ITERS = 1
    # Factor on the learning rate of gamma and beta
    cfg.SOLVER.NORM_LR_FACTOR = 1.0
    # Factor on the learning rate of the backbone
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Factor on the learning rate of the mask head. 0 chooses it for a mask head with a norm, by its
    # channels and the schedule (1 in published recipes), and is 1 for others
    cfg.SOLVER.MASK_HEAD_MULTIPLIER = 0.0
    # Data type of SOLVER.AMP.ENABLED: "float16", as in Detectron2, or "bfloat16"
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Keep only this many of the newest periodic checkpoints; 0 keeps all
    cfg.SOLVER.KEEP_CHECKPOINTS = 0
    # Number of batches with unreadable images, Inf or NaN that a run skips with a warning; the next
    # one aborts it
    cfg.SOLVER.SKIP_BAD_BATCHES = 0
    # End training after this many evaluations in a row without a better TEST.BEST_METRIC; 0 never
    cfg.SOLVER.PATIENCE = 0

    # Metric of the evaluations, such as "segm/AP"; the model with the highest value is kept as
    # model_best.pth
    cfg.TEST.BEST_METRIC = ""
    # Log the training losses on DATASETS.TEST at each evaluation
    cfg.TEST.VALIDATION_LOSS = False
    # Number of validation images that each evaluation draws into TensorBoard, with their detections
    cfg.TEST.DRAWN_IMAGES = 4
    # Experiment trackers that get the metrics: "wandb", "mlflow"
    cfg.TRACKERS = ()

    cfg.PRETRAIN = CfgNode()
    # Number of epochs, and the epochs after which the learning rate is multiplied by SOLVER.GAMMA;
    # SOLVER.MAX_ITER and SOLVER.STEPS are computed from them
    cfg.PRETRAIN.EPOCHS = 100
    cfg.PRETRAIN.STEPS = (30, 60, 90)
    # Batch size that SOLVER.BASE_LR is set for; the rate is scaled linearly to IMS_PER_BATCH
    cfg.PRETRAIN.REFERENCE_BATCH_SIZE = 256
    # Side of the square input images, in pixels
    cfg.PRETRAIN.IMAGE_SIZE = 224
    # Smallest area of a random training crop, as a fraction of the image
    cfg.PRETRAIN.MIN_CROP_AREA = 0.08
    # Dropout before the classifier
    cfg.PRETRAIN.DROPOUT = 0.0
    # Clips: number of frames, and their distance in the video
    cfg.PRETRAIN.FRAMES = 32
    cfg.PRETRAIN.FRAME_STRIDE = 2
    # Clips per video in evaluation, whose class probabilities are averaged
    cfg.PRETRAIN.TEST_CLIPS = 1


def default_config() -> CfgNode:
    """All config keys of Detectron2 and gn_det with their defaults."""
    cfg = get_cfg()
    add_gn_config(cfg)
    return cfg


def is_pretraining(cfg: CfgNode) -> bool:
    """Whether a config trains a classifier, as `tools/pretrain_net.py` does."""
    return cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"


def is_clips(cfg: CfgNode) -> bool:
    """Whether a config classifies clips instead of images."""
    return "i3d" in cfg.MODEL.BACKBONE.NAME


def classes_key(cfg: CfgNode) -> str:
    """The key of the number of classes of things; "" if it is not known for the architecture."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name in ("GeneralizedRCNN", "PanopticFPN"):
        return "MODEL.ROI_HEADS.NUM_CLASSES"
    return "MODEL.RETINANET.NUM_CLASSES" if name in ("RetinaNet", "GNRetinaNet") else ""


def value_of(cfg: CfgNode, key: str) -> object:
    """The value of a key given by its full name, as "MODEL.RESNETS.NORM"; tuples become lists."""
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Map the full names of all keys, as "MODEL.RESNETS.NORM", to their values.

    Args:
        cfg: a config, or a section of one.
        prefix: put before every name, as "MODEL.".
    """
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def as_opts(keys: Mapping[str, object]) -> list[str]:
    """Convert keys and values to the alternating words of `KEY VALUE` command-line overrides."""
    return [str(word) for pair in keys.items() for word in pair]


def default_device() -> str:
    """The default `MODEL.DEVICE` of tools: "cuda" if PyTorch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_opts(opts: Sequence[str]) -> dict[str, str]:
    """Values by key of the `KEY VALUE` words of a command line; `as_opts` is the reverse.

    Raises:
        InputError: for a key without a value.
    """
    if len(opts) % 2:
        raise InputError(f"{opts[-1]} has no value: give KEY VALUE pairs")
    return dict(zip(opts[::2], opts[1::2], strict=True))
