"""Names from the model code of each source, and the expected names in Detectron2."""

import pytest
import torch

from gn_det.checkpoint.names import SOURCES, find_source, rename
from gn_det.errors import InputError

STEM, FIRST = "stem.conv1", "res2.0"
TORCH = {
    "conv1.weight": f"{STEM}.weight",
    "layer1.0.conv1.weight": f"{FIRST}.conv1.weight",
    "layer1.0.downsample.0.weight": f"{FIRST}.shortcut.weight",
    "layer1.0.downsample.1.bias": f"{FIRST}.shortcut.norm.bias",
    "layer4.2.conv3.weight": "res5.2.conv3.weight",
}
NAMES = {
    # torchvision/models/resnet.py
    "torchvision": {
        **TORCH,
        "bn1.running_mean": f"{STEM}.norm.running_mean",
        "layer3.5.bn3.weight": "res4.5.conv3.norm.weight",
    },
    # resnet_gn.py of GroupNorm-reproduce: GroupNorm layers called bn, saved from DataParallel
    "groupnorm-reproduce": {
        "module.conv1.weight": f"{STEM}.weight",
        "module.bn1.weight": f"{STEM}.norm.weight",
        "module.layer1.0.conv1.weight": f"{FIRST}.conv1.weight",
        "module.layer1.0.bn2.bias": f"{FIRST}.conv2.norm.bias",
    },
    # mmcv's build_norm_layer: the norm's abbreviation and its number
    "mmdetection": {
        **TORCH,
        "gn1.weight": f"{STEM}.norm.weight",
        "layer1.0.gn1.weight": f"{FIRST}.conv1.norm.weight",
        "layer1.0.gn3.bias": f"{FIRST}.conv3.norm.bias",
    },
    # Detectron's lib/modeling/ResNet.py: Caffe2 blobs
    "detectron": {
        "conv1_w": f"{STEM}.weight",
        "conv1_gn_s": f"{STEM}.norm.weight",
        "conv1_gn_b": f"{STEM}.norm.bias",
        "res2_0_branch1_w": f"{FIRST}.shortcut.weight",
        "res2_0_branch1_gn_s": f"{FIRST}.shortcut.norm.weight",
        "res2_0_branch2a_w": f"{FIRST}.conv1.weight",
        "res2_0_branch2b_gn_b": f"{FIRST}.conv2.norm.bias",
        "res4_5_branch2c_w": "res4.5.conv3.weight",
        "res5_2_branch2c_gn_s": "res5.2.conv3.norm.weight",
    },
    # tensorpack's examples/ResNet: TensorFlow scopes
    "tensorpack": {
        "conv0/W": f"{STEM}.weight",
        "conv0/gn/gamma": f"{STEM}.norm.weight",
        "group0/block0/conv1/W": f"{FIRST}.conv1.weight",
        "group0/block0/convshortcut/W": f"{FIRST}.shortcut.weight",
        "group0/block0/convshortcut/gn/beta": f"{FIRST}.shortcut.norm.bias",
        "group2/block5/conv3/gn/gamma": "res4.5.conv3.norm.weight",
    },
    "detectron2": {
        "backbone.bottom_up.stem.conv1.weight": f"{STEM}.weight",
        "backbone.bottom_up.res2.0.conv1.weight": f"{FIRST}.conv1.weight",
        "backbone.bottom_up.res2.0.conv1.norm.bias": f"{FIRST}.conv1.norm.bias",
        "res5.2.conv3.norm.weight": "res5.2.conv3.norm.weight",
    },
}


@pytest.mark.parametrize("source", NAMES)
def test_names(source):
    names = NAMES[source]
    tensors = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    renamed = rename(tensors, SOURCES[source]).tensors
    assert renamed == {new: tensors[name] for name, new in names.items()}
    # timm and GroupNorm-reproduce share torchvision's rules
    assert SOURCES[find_source(names)].rename is SOURCES[source].rename


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stages.0.blocks.0.conv1.weight", "pre-activation"),  # timm's resnetv2
        ("resnet/block1/unit01/a/standardized_conv2d/kernel", "pre-activation"),  # BiT
        ("stages.0.blocks.0.conv_dw.weight", r"blocks\.0\.conv_dw.*torchvision"),  # timm's ConvNeXt
        ("features.conv0.weight", r"features\.conv0.*torchvision"),  # DenseNet
    ],
)
def test_names_of_other_networks(name, message):
    with pytest.raises(InputError, match=message):
        find_source([name])
